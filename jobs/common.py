"""The parts that all commands share: logging, errors in one line, exit codes.

| code | meaning |
|---|---|
| 0 | done |
| 1 | done, and the answer is no: an evaluated model is worse than its reference |
| 2 | not done, for the reason that is printed |
| 130, 143 | interrupted by Ctrl-C or SIGTERM; the same command goes on where it was |
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pipelines.cluster.exits import FailedRun, Worse
from pipelines.cluster.masking import Masking, mask_output, masked

TRACKING = {"--tracking-uri": "--tracking.uri"}
"""The former name of the option of jobs that read from MLflow, which is still accepted, and the present one."""

SPELLINGS = {**TRACKING, "--data": "--data.root", "--split": "--data.split", "--shards": "--data.shards"}
"""Former and present names of options of jobs that read data, too."""

INTERRUPTED = {128 + signal.SIGINT: "Ctrl-C", 128 + signal.SIGTERM: "SIGTERM"}


def command(main: Callable[[Sequence[str] | None], Any], arguments: Sequence[str] | None = None) -> None:
    """Run a job's `main` as a program: what is wrong with the input is one line and an exit code."""
    mask_output()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where each client has its credentials from
    for handler in logging.getLogger().handlers:
        handler.addFilter(Masking())
    try:
        main(arguments)
    except (ValueError, OSError, FailedRun) as error:  # a store that is away is an OSError
        print(f"error: {masked(error)}", file=sys.stderr, flush=True)
        sys.exit(1 if isinstance(error, Worse) else 2)
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 128 + signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.code
        if code not in INTERRUPTED:
            raise
        print(f"interrupted by {INTERRUPTED[code]}; the same command goes on", file=sys.stderr, flush=True)
        sys.exit(code)
