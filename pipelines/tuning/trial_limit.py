"""A trial_limit through which only as many trials go into training as the cluster holds.

Tune limits the trials that are drawn. On --resume it starts every unfinished and every failed one at once, whose
workers would then wait for each other's CPUs; here they wait before they ask for any.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

POLL_SECONDS = 1.0


class TrialLimit:
    """Which of the trials that Tune has started may train."""

    def __init__(self, most: int) -> None:
        """Args:
        most: at once.
        """
        self._most = most
        self._allowed: list[str] = []

    def update(self, running: Sequence[str]) -> list[str]:
        """Those that went through and still run keep their place; the first of the others take what is free."""
        kept = [identity for identity in self._allowed if identity in running]
        waiting = [identity for identity in running if identity not in kept]
        self._allowed = kept + waiting[: max(0, self._most - len(kept))]
        return self._allowed

    def allowed(self, identity: str) -> bool:
        """Whether a trial may train."""
        return identity in self._allowed


def create_trial_limit(parent: str, most: int) -> Any:
    """The trial_limit of the sweep whose MLflow run is `parent`; it stands as long as its handle."""
    import ray

    return ray.remote(num_cpus=0)(TrialLimit).options(name=name_of(parent)).remote(most)


def find_trial_limit(parent: str) -> Any:
    """The trial_limit of a sweep, None where there is none."""
    import ray

    try:
        return ray.get_actor(name_of(parent))
    except ValueError:
        return None


def wait(parent: str, identity: str) -> None:
    """Until a trial may train."""
    import ray

    trial_limit = find_trial_limit(parent)
    while trial_limit is not None and not ray.get(trial_limit.allowed.remote(identity)):
        time.sleep(POLL_SECONDS)


def name_of(parent: str) -> str:
    """Of the actor."""
    return f"trial_limit-{parent}"
