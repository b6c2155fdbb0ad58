"""`make cluster` before it starts anything; the whole of it takes minutes and is run by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import postgres


def test_without_postgresql_it_says_what_to_install() -> None:
    """In one line, before a process or a folder is made."""
    script = "import shutil; shutil.which = lambda *_: None\nfrom tests.support import postgres\n"
    script += "postgres.FOLDER = postgres.Path('/nowhere')\n"
    script += "import runpy; runpy.run_module('tests.cluster_demo', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"make cluster: {postgres.MISSING}\n"


def test_the_newest_server_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("9.6", "15", "17"):
        (tmp_path / version / "bin").mkdir(parents=True)
        (tmp_path / version / "bin" / "initdb").touch()
    monkeypatch.setattr(postgres, "FOLDER", tmp_path)
    assert postgres.program("initdb") == str(tmp_path / "17" / "bin" / "initdb")
