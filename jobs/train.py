"""Train a preset: `python jobs/train.py [PRESET] [--option value …]`; no preset is the demo.

`--list` shows the presets, `PRESET --help` the usual options of one, `--help-all` every option. `--dry-run`, after
any of them, checks the options and the data, says what would be done and written, and stops.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import command
from pipelines.config import parse
from pipelines.presets import PRESETS
from pipelines.presets.listing import listing
from pipelines.training.sharing import check_alone

if TYPE_CHECKING:
    from pipelines.training.driver import Outcome

DRY_RUN = "--dry-run"
"""Flag beside a preset's options that is none of them: a run does not remember it."""


def main(arguments: Sequence[str] | None = None) -> Outcome | None:
    """Run it, print the best table and where everything lies; `--list` and `--dry-run` only show what there is."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--list" in given:
        print(listing(PRESETS), flush=True)
        return None
    preset, experiment = parse([word for word in given if word != DRY_RUN], PRESETS, others=("--list", DRY_RUN))
    check_alone(experiment)

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from pipelines.training.driver import closing_lines, train
    from pipelines.training.dry_run import dry_run

    if DRY_RUN in given:
        print(dry_run(experiment, preset), flush=True)
        return None
    outcome = train(experiment, preset)
    print(closing_lines(outcome), flush=True)
    return outcome


if __name__ == "__main__":
    command(main)
