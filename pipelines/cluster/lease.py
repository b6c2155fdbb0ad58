"""A lease: of several processes on several machines one works, and one that dies is followed by another.

A lease is a folder of numbered files, of which the last one counts: {"owner", "expires", …}. Whoever finds none, an
expired one, or one whose process on this machine is gone, creates the next number, which succeeds for one only;
nothing is ever taken from anybody. The holder moves its expiry on while it works. Machines whose clocks differ by more
than the expiry may both work, so whoever holds a lease must look again whether the work is done, and before it hands in
whether it still holds it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic takes typing's from Python 3.12 on
)

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from pipelines.cluster import storage
from pipelines.cluster.json_file import read_json

logger = logging.getLogger(__name__)

EXPIRY = 300.0
"""Seconds without a sign of life after which a holder counts as dead."""

HOLD_EXPIRY = 60.0
"""Seconds without a sign of life after which the holder of a place counts as dead on another machine."""

FARTHEST = 12
"""An expiry further ahead than this many times the lease's seconds, or `EXPIRY` if that is more, is not believed."""

PATIENCE = 60.0
"""Seconds that `wait` waits for a lease that is held for moments."""


@with_config(ConfigDict(extra="allow"))
class Content(TypedDict):
    """The content of a lease's file, as far as it is relied on."""

    owner: str
    expires: float
    pid: NotRequired[Annotated[int, Field(gt=0)]]
    since: NotRequired[Annotated[float, Field(ge=0, lt=1e11)]]
    session: NotRequired[str]
    machine: NotRequired[str]


_left: set[str] = set()
"""Owners of this process that could not give up their leases, since the store was away."""


class Busy(OSError):
    """Another process holds a lease; whoever tries again later may get it."""


@dataclass(frozen=True)
class Lease:
    """A lease that this process holds."""

    folder: str
    number: int
    owner: str
    seconds: float
    about: dict[str, Any] = field(default_factory=dict, compare=False)
    """Facts about this holder for a follower, beside who it is."""

    def held(self) -> bool:
        """True while no other process has taken the lease after this one."""
        return _numbers(self.folder)[-1:] == [self.number]

    def renew(self, seconds: float | None = None) -> None:
        """Extend the lease to `seconds` from now (`self.seconds` by default; 0 gives it up)."""
        seconds = self.seconds if seconds is None else seconds
        storage.write_bytes(_file(self.folder, self.number), _content(self.owner, seconds, self.about))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context in which the lease is renewed in the background; given up at its end.

        A store that errs now and then ends neither the renewals nor the work, which may be done by then. One that was
        away at the last renewal is not asked again at the end: the lease expires by itself.
        """
        stop, reached = threading.Event(), True

        def renewing() -> None:
            nonlocal reached
            pause = self.seconds / 3
            while not stop.wait(pause):
                reached = self._renewed()
                pause = self.seconds / (3 if reached else 10)

        thread = threading.Thread(target=renewing, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            if not (reached and self._renewed(0)):
                _left.add(self.owner)

    def _renewed(self, seconds: float | None = None) -> bool:
        """Renew the lease unless another process has taken it; False where the store erred."""
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
    if numbers and _expires(folder, numbers[-1], seconds) > time.time() and _alive(last(folder)) is not False:
        return None
    about = {"machine": _machine(), "pid": os.getpid(), "began": _began(os.getpid()), "since": time.time()}
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    lease = Lease(folder, (numbers or [0])[-1] + 1, owner, seconds, about)
    return lease if storage.create(_file(folder, lease.number), _content(owner, seconds, about)) else None


@contextmanager
def hold(
    folder: storage.Uri, what: str, seconds: float = HOLD_EXPIRY, otherwise: str = "give another --name"
) -> Iterator[Lease]:
    """Hold the lease of a place for as long as this lasts; only one process works there.

    A holder on this machine is asked whether it lives. One on another machine shows it by renewing its lease, for
    which this waits: at most `seconds`, after which the place is free.

    Args:
        folder: as for `acquire`.
        what: the place, for messages.
        seconds: without a renewal after which it expires.
        otherwise: the remedy beside waiting, for messages.

    Raises:
        Busy: another process works there; the message names it.
    """
    first = last(folder)
    while (lease := _acquire_unless_alive(folder, seconds)) is None:
        holding = last(folder)
        if _alive(holding) or holding.get("expires") != first.get("expires"):
            raise Busy(f"{what} is in use by {_name(holding)}; wait until it has ended, or {otherwise}")
        if holding.get("owner") == first.get("owner"):
            logger.info("%s was in use by %s; waiting for a sign of its life", what, _name(holding))
        time.sleep(min(1.0, seconds / 10))
    with lease.kept():
        yield lease


def _acquire_unless_alive(folder: storage.Uri, seconds: float) -> Lease | None:
    """`acquire`, unless the holder is a living process of this machine: that one may only have been halted for long."""
    holding = last(folder)
    return None if _alive(holding) and not holding.get("released") else acquire(folder, seconds)


def last(folder: storage.Uri) -> dict[str, Any]:
    """The last lease's facts about its holder; {} where a folder has none, or none that can be read."""
    folder = storage.absolute(folder)
    numbers = _numbers(folder)
    return _read(_file(folder, numbers[-1])) if numbers else {}


def _read(file: str) -> dict[str, Any]:
    """The content of a lease's file; {} where it is not filled yet, cut short or was edited."""
    try:
        return read_json(file, Content, "")
    except (ValueError, OSError):
        return {}


def is_gone(holding: Mapping[str, Any]) -> bool:
    """True if a holder was a process of this machine that exists no more."""
    return _alive(holding) is False


def is_alive(holding: Mapping[str, Any]) -> bool | None:
    """True if a holder is a process of this machine that exists; None where that cannot be seen from here."""
    return _alive(holding)


def count(folder: storage.Uri) -> int:
    """The number of times that a lease was taken."""
    return (_numbers(storage.absolute(folder)) or [0])[-1]


def describe(holding: Mapping[str, Any]) -> str:
    """A holder as a person looks for it: process, machine, since when."""
    return _name(holding)


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
    """The process that holds a lease, for messages."""
    return last(folder).get("owner", "another process")


def _name(holding: Mapping[str, Any]) -> str:
    """A holder as a person looks for it."""
    if "since" not in holding:
        return str(holding.get("owner", "another process"))
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holding["since"]))
    return f"process {holding.get('pid', '?')} on {holding['owner'].split(':')[0]} since {since}"


def _machine() -> str:
    """The machine since its last start, and the container on it: where process numbers mean the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _began(pid: int) -> str | None:
    """The start of a process in its machine's clock ticks; "" where that is not told, None without a process."""
    try:
        status, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:  # somebody else's
            return ""
        return ""
    return None if status in "ZX" else fields[18]


def _alive(holding: Mapping[str, Any]) -> bool | None:
    """True if the holder's process exists and has not left; None where that cannot be seen from here."""
    if holding.get("owner") in _left:
        return False
    if holding.get("machine") != _machine() or "pid" not in holding:
        return None
    return _began(int(holding["pid"])) == holding.get("began")


def _file(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.json")


def _content(owner: str, seconds: float, about: Mapping[str, Any]) -> bytes:
    content = {**about, "owner": owner, "expires": time.time() + seconds, "released": not seconds}
    return json.dumps(content).encode()


def _numbers(folder: str) -> list[int]:
    if not storage.exists(folder):
        return []
    return sorted(int(name[:6]) for name in storage.list_files(folder) if name.endswith(".json") and name[:6].isdigit())


def _expires(folder: str, number: int, seconds: float) -> float:
    """The end of a lease; of a file that is not filled yet, or whose end cannot be meant, `seconds` from its writing.

    An end that lies further ahead than any holder sets it comes of an edited file, or of a clock that was wrong.
    """
    expires = _read(_file(folder, number)).get("expires", math.inf)
    if expires < time.time() + FARTHEST * max(seconds, EXPIRY):
        return expires
    return storage.list_stamps(folder)[f"{number:06d}.json"][1] + seconds
