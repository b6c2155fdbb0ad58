"""Sweep options, or run studies of the papers.

    python jobs/tune.py [PRESET] --sweep "optim.lr=loguniform(1e-5,1e-3)" "optim.ema=grid(0,0.99)" --samples 4
    python jobs/tune.py --study list
    python jobs/tune.py --study freezing-r50 aspp --small --data.root FOLDER --steps 400 --seeds 2

`--help` lists the options of sweeps and studies; those of `jobs/train.py PRESET --help` may follow and hold for all.
"""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipelines.config import parse_known
from pipelines.presets import PRESETS
from pipelines.studies import run
from pipelines.tuning import sweep
from pipelines.tuning.results import closing_lines

INTERRUPTED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a sweep that can go on."""


def main(arguments: list[str] | None = None) -> Any:
    """Run it and print the table; a study's result is its report, a sweep's what it left."""
    options, rest = parse_known(run.Options, sys.argv[1:] if arguments is None else arguments, str(__doc__))
    if options.study == ("list",):
        print(run.listing(PRESETS))
        return None
    if options.study:
        report = run.run(options, rest, PRESETS)
        print(report.text, flush=True)
        return report
    done = sweep.sweep(options, rest, PRESETS)
    print(closing_lines(done), flush=True)
    return done


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except (ValueError, ConnectionError) as error:
        sys.exit(f"error: {error}")
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        if code not in INTERRUPTED:
            raise
        print("interrupted; the same command with --name NAME and --resume goes on", file=sys.stderr, flush=True)
        sys.exit(code)
