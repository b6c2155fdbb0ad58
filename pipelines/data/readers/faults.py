"""The error of an image that cannot be used: its reason and its remedy, apart."""

from __future__ import annotations

FETCH = "fetch the missing file from the data set's source, or take the image out"
UNPACK = "unpack the file again from the archive of its owner"
DRAW = "correct the annotation in the tool that it comes from, and export it again"
"""Remedies that several readers give."""


class Fault(ValueError):
    """An image fails validation. Reason and remedy become a row of the table of problems."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy

    def __reduce__(self) -> tuple[type[Fault], tuple[str, str]]:
        return Fault, (self.reason, self.remedy)


def placed(place: str, error: ValueError) -> ValueError:
    """An error with the place where it happened before its reason; a `Fault` keeps its remedy."""
    if isinstance(error, Fault):
        return Fault(f"{place}: {error.reason}", error.remedy)
    return ValueError(f"{place}: {error}")
