"""The code that made a run and the user who started it, as tags of every MLflow run."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.cluster.masking import masked


def code_version() -> dict[str, str]:
    """Version of the package, the commit and whether files differ from it.

    They are those of the git checkout; in a copy without one, that a cluster was sent, as `PANOPTIC_COMMIT` and
    `PANOPTIC_DIRTY` say (`pipelines.cluster.submission`).
    """
    try:
        tags = {"version": version("panoptic-ray")}
    except PackageNotFoundError:
        tags = {}
    folder = Path(__file__).resolve().parents[2]
    commit = _git(folder, "rev-parse", "HEAD")
    if commit and (folder / ".git").exists():
        tags["mlflow.source.git.commit"] = commit
        tags["commit_dirty"] = str(bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))).lower()
    elif sent := os.environ.get("PANOPTIC_COMMIT"):
        tags["mlflow.source.git.commit"] = sent
        tags["commit_dirty"] = os.environ.get("PANOPTIC_DIRTY", "")
    return tags


def origin() -> dict[str, str]:
    """The user and command that started the run, under the names of MLflow's own tags."""
    try:
        user = {"mlflow.user": getpass.getuser()}
    except (KeyError, OSError):  # a container without an entry for its user
        user = {}
    # MLflow's pages show what follows the last slash of the source, which of a whole command is part of an argument.
    return {
        **user,
        "mlflow.source.name": sys.argv[0],
        "mlflow.source.type": "LOCAL",
        "command": masked(shlex.join(sys.argv))[:5000],
    }


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
