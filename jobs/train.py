"""Train a preset: `python jobs/train.py [PRESET] [--path value …]`; no preset is the demo.

`python jobs/train.py PRESET --help` lists every option.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import command
from pipelines.config import parse
from pipelines.presets import PRESETS
from pipelines.training.driver import Outcome, closing_lines, train


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Run it, print the best table and where everything lies."""
    preset, experiment = parse(sys.argv[1:] if arguments is None else arguments, PRESETS)
    outcome = train(experiment, preset)
    print(closing_lines(outcome), flush=True)
    return outcome


if __name__ == "__main__":
    command(main)
