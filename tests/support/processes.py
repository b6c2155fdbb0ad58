"""Memory, CPU and bytes read of this process and of those that it started, a local Ray session's among them."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

NAMES = ("raylet", "gcs_server", "log_monitor", "monitor.py", "dashboard.py", "dashboard/agent.py")
"""Parts of command lines that tell Ray's own processes which have no title."""


@dataclass(frozen=True)
class Usage:
    """What one process has used."""

    name: str
    memory: int
    """Bytes that are its own (USS): shared libraries and the object store are not in it."""
    cpu: float
    """Seconds."""
    read: int
    """Bytes asked for by `read` and its like, from the page cache too, but not through memory maps."""


def usage() -> dict[int, Usage]:
    """The usage of this process and of every process below it, by their ids."""
    found = {}
    here = psutil.Process()
    for process in [here, *here.children(recursive=True)]:
        try:
            with process.oneshot():
                cpu, memory = process.cpu_times(), process.memory_full_info()
                name = "this process" if process.pid == here.pid else _name(process.cmdline())
                read = process.io_counters().read_chars
            found[process.pid] = Usage(name, memory.uss, cpu.user + cpu.system, read)
        except psutil.NoSuchProcess:
            continue
    return found


def _name(command: list[str]) -> str:
    words = " ".join(command)
    if words.startswith("ray"):  # the title of a worker or an agent
        return words.split(" ")[0]
    # the raylet's command line holds those of the agents that it starts
    return next((name for name in NAMES if any(word.endswith(name) for word in command[:4])), words[:40])
