"""The errors with which a command ends in its own way; `jobs.common` knows their exit codes."""

from __future__ import annotations


class FailedRun(RuntimeError):
    """A run gave up after as many failures as it may have; the message is one line."""


class Worse(ValueError):
    """PQ fell below the reference by more than the margin."""
