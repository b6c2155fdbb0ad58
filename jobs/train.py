"""Train a preset: `python jobs/train.py [PRESET] [--path value …]`; no preset is the demo.

`python jobs/train.py --list` shows the presets, `python jobs/train.py PRESET --help` every option.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import command
from pipelines.config import parse
from pipelines.presets import PRESETS
from pipelines.presets.listing import listing
from pipelines.training.driver import Outcome, closing_lines, train


def main(arguments: Sequence[str] | None = None) -> Outcome | None:
    """Run it, print the best table and where everything lies; with `--list` only show the presets."""
    given = sys.argv[1:] if arguments is None else arguments
    if "--list" in given:
        print(listing(PRESETS), flush=True)
        return None
    preset, experiment = parse(given, PRESETS)
    outcome = train(experiment, preset)
    print(closing_lines(outcome), flush=True)
    return outcome


if __name__ == "__main__":
    command(main)
