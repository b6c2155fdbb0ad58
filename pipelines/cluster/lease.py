"""A lease: of several processes on several machines one works, and one that dies is followed by another.

A lease is a folder of numbered files, of which the last one counts: {"owner", "expires"}. Whoever finds none, or
an expired one, creates the next number, which succeeds for one only; nothing is ever taken from anybody. The
holder moves its expiry on while it works. Machines whose clocks differ by more than the expiry may both work, so
whoever holds a lease must look again whether the work is done, and before it hands in whether it still holds it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipelines.cluster import storage

logger = logging.getLogger(__name__)

EXPIRY = 300.0
"""Seconds without a sign of life after which a holder counts as dead."""

PATIENCE = 60.0
"""Seconds that `wait` waits for a lease that is held for moments."""


class Busy(OSError):
    """Another process holds a lease; whoever tries again later may get it."""


@dataclass(frozen=True)
class Lease:
    """Held by this process."""

    folder: str
    number: int
    owner: str
    seconds: float

    def held(self) -> bool:
        """Whether nobody has followed."""
        return _numbers(self.folder)[-1:] == [self.number]

    def renew(self, seconds: float | None = None) -> None:
        """Live `seconds` more (its expiry by default; 0 gives it up)."""
        expires = time.time() + (self.seconds if seconds is None else seconds)
        storage.write_bytes(_file(self.folder, self.number), _content(self.owner, expires))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renewed in the background; given up at the end.

        A store that errs now and then ends neither the renewals nor the work, which may be done by then.
        """
        stop = threading.Event()

        def renewing() -> None:
            pause = self.seconds / 3
            while not stop.wait(pause):
                pause = self.seconds / (3 if self._renewed() else 10)

        thread = threading.Thread(target=renewing, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._renewed(0)

    def _renewed(self, seconds: float | None = None) -> bool:
        """Renew it unless somebody followed; False where the store erred."""
        try:
            if self.held():
                self.renew(seconds)
        except OSError as error:
            logger.warning(
                "lease %s: %s (%s)", self.folder, "not renewed" if seconds is None else "left to expire", error
            )
            return False
        return True


def acquire(folder: storage.Uri, seconds: float = EXPIRY) -> Lease | None:
    """The lease, or None while another process holds it.

    Args:
        folder: one for each piece of work, local or on S3; nothing else may be in it.
        seconds: without a renewal after which it expires.
    """
    folder = storage.absolute(folder)
    numbers = _numbers(folder)
    if numbers and _expires(folder, numbers[-1], seconds) > time.time():
        return None
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    lease = Lease(folder, (numbers or [0])[-1] + 1, owner, seconds)
    return lease if storage.create(_file(folder, lease.number), _content(owner, time.time() + seconds)) else None


def wait(folder: storage.Uri, seconds: float = EXPIRY) -> Lease:
    """The lease, as soon as nobody else holds it.

    Raises:
        Busy: somebody held it for the whole of `PATIENCE`.
    """
    end = time.monotonic() + PATIENCE
    while True:
        lease = acquire(folder, seconds)
        if lease is not None:
            return lease
        if time.monotonic() > end:
            raise Busy(f"{storage.absolute(folder)} is held by {holder(folder)}; try again")
        time.sleep(min(1.0, PATIENCE / 10))


def holder(folder: storage.Uri) -> str:
    """Who holds it, for messages."""
    folder = storage.absolute(folder)
    numbers = _numbers(folder)
    try:
        return json.loads(storage.read_bytes(_file(folder, numbers[-1])))["owner"]
    except (ValueError, IndexError, OSError):
        return "another process"


def _file(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _content(owner: str, expires: float) -> bytes:
    return json.dumps({"owner": owner, "expires": expires}).encode()


def _numbers(folder: str) -> list[int]:
    if not storage.exists(folder):
        return []
    return sorted(int(name[:6]) for name in storage.list_files(folder) if name.endswith(".json") and name[:6].isdigit())


def _expires(folder: str, number: int, seconds: float) -> float:
    """Of a file that was created but not yet filled: `seconds` from then."""
    try:
        return float(json.loads(storage.read_bytes(_file(folder, number)))["expires"])
    except ValueError:
        return storage.list_stamps(folder)[f"{number:06d}.json"][1] + seconds
