"""The error of an image that cannot be used: its reason and its remedy, apart."""

from __future__ import annotations


class Fault(ValueError):
    """An image fails validation. Reason and remedy become a row of the table of problems."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy

    def __reduce__(self) -> tuple[type[Fault], tuple[str, str]]:
        return Fault, (self.reason, self.remedy)
