"""Functions for actors that are killed over their work. Each actor imports this module: it imports nothing itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def unbuildable() -> Callable[[int], int]:
    """A function whose set-up kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def deadly(poison: Any) -> Callable[[Any], Any]:
    """A function that returns its items; the process that is asked for `poison` is killed over it, each time."""

    def work(item: Any) -> Any:
        if item == poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    return work
