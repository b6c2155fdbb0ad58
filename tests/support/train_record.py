"""Reads what Ray Train has written down about a run: the checkpoints from which it would go on."""

from __future__ import annotations

import json
from pathlib import Path

from pipelines.training.checkpoints import SNAPSHOT


def committed(run: Path) -> set[str]:
    """Names of the checkpoints that Ray Train lists in a run's folder.

    These are whole and stay as they are. Files of another one may be there already, or cut short, while it is copied: a
    process that is killed meanwhile leaves it to be written once more.
    """
    try:
        snapshot = json.loads((run / SNAPSHOT).read_text())
    except (FileNotFoundError, ValueError):  # none yet, or it is being written
        return set()
    return {result["checkpoint_dir_name"] for result in snapshot["checkpoint_results"]}
