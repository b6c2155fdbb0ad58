"""Run a step again whose numbers were not finite: `python jobs/replay.py FILE`.

FILE lies in the folder `broken` of a run that stopped at it, one for each worker. Prints the losses, the first modules
whose output is not finite, and the parameters whose gradient is not.

Exit codes: 0 = it is not finite again; 1 = everything is finite in this worker's part of the batch; 2 = no such file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import command
from pipelines.config import File, parse_options

if TYPE_CHECKING:
    from pipelines.training.broken import Replay

SHOWN = 10
"""Names of modules and parameters that are printed."""


@dataclass(frozen=True)
class Options:
    """The step, and where it runs."""

    file: File
    """A file in the folder `broken` of a run, local or s3://."""
    device: str = "cpu"
    """Device of torch; where the training was on a GPU, `cuda` has its kernels."""


def main(arguments: Sequence[str] | None = None) -> Replay:
    """Print what the step gives; exit with 1 where all of it is finite."""
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), {})

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from pipelines.training.broken import replay

    found = replay(options.file, options.device)
    print(f"step {found.step}, images {', '.join(found.names)}")
    print(", ".join(f"{name} {value:.4g}" for name, value in found.losses.items()))
    for what, names in (("output of", found.modules), ("gradient of", found.gradients)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            print(f"not finite: {what} {', '.join(names[:SHOWN])}{more}")
    if not found.broken:
        print("all of it is finite: another worker's part was not, or another device gives other numbers")
        sys.exit(1)
    return found


if __name__ == "__main__":
    command(main)
