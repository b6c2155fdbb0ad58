"""Sweep options, or run studies of the papers.

    python jobs/tune.py [PRESET] --sweep "optim.lr=loguniform(1e-5,1e-3)" "optim.ema=grid(0,0.99)" --samples 4
    python jobs/tune.py --study list
    python jobs/tune.py --study freezing-r50 aspp --small --data.root FOLDER --steps 400 --seeds 2

`--help` lists the usual options of sweeps and studies, `--help-all` all; those of `jobs/train.py PRESET --help-all` may
follow, for all trials. `--dry-run` checks everything, says which trials there would be, and stops. After an
interruption the same command with --name NAME and --resume goes on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import command
from pipelines.config import parse_known
from pipelines.presets import PRESETS
from pipelines.studies.config import Options, check
from pipelines.studies.listing import listing
from pipelines.tuning.config import read_command

USUAL = (
    *("sweep", "samples", "searcher", "scheduler", "baseline", "metric", "concurrent", "resume", "dry_run"),
    *("study", "small", "steps", "seeds", "pretrain_steps"),
)
"""Options that most calls name, in the order of use: those of --help."""


def main(arguments: Sequence[str] | None = None) -> Any:
    """Run it and print the table; a study's result is its report, a sweep's what it left."""
    logging.getLogger().setLevel(logging.WARNING)  # one table stands for what all trials have to say
    options, rest = parse_known(Options, sys.argv[1:] if arguments is None else arguments, str(__doc__), USUAL)
    if options.study == ("list",):
        print(listing(PRESETS))
        return None
    if options.study:
        check(options, rest, PRESETS)
    else:
        read_command(options, rest, PRESETS)

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from pipelines.studies import run
    from pipelines.tuning import sweep
    from pipelines.tuning.results import closing_lines

    if options.dry_run:
        print(
            run.outline(options, rest, PRESETS) if options.study else sweep.outline(options, rest, PRESETS), flush=True
        )
        return None
    if options.study:
        report = run.run(options, rest, PRESETS)
        print(report.text, flush=True)
        return report
    done = sweep.sweep(options, rest, PRESETS)
    print(closing_lines(done), flush=True)
    return done


if __name__ == "__main__":
    command(main)
