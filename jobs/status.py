"""The status of a run, from its files and MLflow alone: `python jobs/status.py RUN`.

RUN is the name of a run in --storage, or its folder, local or s3://. Prints the state, the step, PQ, the last
checkpoint and its age, the speed, the time left, who works on it, and how often it was started again.

Exit codes: 0 = preparing, running, stopped as it was told to, or finished; 1 = stalled, dead, failed, killed, ended
early; 2 = there is no such run.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import TRACKING, command
from panoptic.ranges import PositiveFloat
from pipelines.config import Run, Store, parse_options
from pipelines.tracking.config import Tracking

if TYPE_CHECKING:
    from pipelines.training import status as status_module


@dataclass(frozen=True)
class Options:
    """The run, and the form of the answer."""

    run: Run
    """Name of a run in --storage, or its folder, local or s3://."""
    storage: str = "runs"
    """Folder or s3:// prefix of runs."""
    json: bool = False
    """Print one JSON object, with times as Unix times."""
    files_only: bool = False
    """Leave MLflow alone."""
    stalled_after: PositiveFloat = 1800.0
    """Seconds without a log line or a checkpoint after which a run that is held counts as stalled."""
    tracking: Store = field(default_factory=Store)
    """MLflow."""


def main(arguments: Sequence[str] | None = None) -> status_module.Status:
    """Print the status; exit with 1 where somebody should look after the run."""
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), TRACKING)

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from pipelines.cluster import storage
    from pipelines.training import status as status_module

    folder = options.run if "/" in options.run else storage.join(options.storage, options.run)
    tracking = Tracking(uri=options.tracking.uri)
    status = status_module.status(folder, tracking, options.stalled_after, options.files_only)
    print(json.dumps(plain(status), indent=1) if options.json else status_module.lines(status), flush=True)
    if not status.well:
        sys.exit(1)
    return status


def plain(status: status_module.Status) -> dict[str, Any]:
    """The status as JSON has it: what is not known is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(entry) for key, entry in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return finite(asdict(status)) | {"well": status.well}


if __name__ == "__main__":
    command(main)
