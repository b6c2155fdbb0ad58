"""One way to call every job: names, former names, help, errors and exit codes."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.__main__ import JOBS, main
from jobs.common import command
from pipelines.config import Split, Store

ROOT = Path(__file__).resolve().parents[2]


def test_the_list_of_jobs_is_the_folder() -> None:
    files = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__", "__main__", "common"}
    assert files == set(JOBS)


@pytest.mark.parametrize("name", JOBS)
def test_every_job_finds_the_packages_before_it_imports_from_them(name: str) -> None:
    """`python jobs/NAME.py` also runs where the project is not installed."""
    body = ast.parse((ROOT / "jobs" / f"{name}.py").read_text()).body
    (found,) = (k for k, node in enumerate(body) if ast.unparse(node).startswith("sys.path.insert("))
    before = [node.module or "" for node in body[:found] if isinstance(node, ast.ImportFrom)]
    assert [module for module in before if module.split(".")[0] in ("jobs", "pipelines", "panoptic")] == []


@pytest.mark.parametrize("name", JOBS)
def test_every_job_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"jobs.{name}")
    with pytest.raises(SystemExit) as end:
        command(module.main, ["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "options" in printed and (name in ("train", "tune") or str(module.__doc__).split("`")[0].strip() in printed)


@pytest.mark.parametrize("name", ["evaluate", "oracle", "independent"])
def test_the_same_thing_has_the_same_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command(importlib.import_module(f"jobs.{name}").main, ["--help-all"])
    printed = capsys.readouterr().out
    assert all(f"--data.{field.replace('_', '-')}" in printed for field in Split.__dataclass_fields__)
    assert all(f"--tracking.{field}" in printed for field in Store.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "arguments", "new"),
    [
        ("evaluate", ["model.pt", "--data", "nowhere", "--split", "val"], ["--data.root", "--data.split"]),
        ("oracle", ["model.pt", "--data", "nowhere", "--tracking-uri=sqlite://"], ["--data.root", "--tracking.uri"]),
        (
            "independent",
            ["a.pt", "b.pt", "c.pt", "--data", "nowhere", "--shards", "s"],
            ["--data.root", "--data.shards"],
        ),
        ("predict", ["model.pt", "nowhere", "--out", "o", "--tracking-uri", "sqlite://"], ["--tracking.uri"]),
        (
            "prepare",
            ["coco", "nowhere", "--split", "val", "--out", "o", "--on-invalid", "skip"],
            ["--data.reader", "--data.split", "--data.on-invalid"],
        ),
    ],
)
def test_former_names_are_accepted_and_the_new_ones_said(
    name: str, arguments: list[str], new: list[str], tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job then fails at what is not there, in one line, and not at its options."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        command(importlib.import_module(f"jobs.{name}").main, arguments)
    *notes, error = capsys.readouterr().err.splitlines()[: len(new) + 1]
    assert end.value.code == 2 and error.startswith("error: ")
    assert all(f"now {option}" in note for option, note in zip(new, notes, strict=True))


def test_an_unknown_job_is_named_with_the_known_ones(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["panoptic-ray", "trian"])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert (
        end.value.code == 2 and "there is no job 'trian'; near: train" in error and all(name in error for name in JOBS)
    )
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_command_and_the_script_are_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script from another folder, as a user and as `ray job submit` call it; a wrong preset ends both alike."""
    script = [sys.executable, str(ROOT / "jobs" / "train.py"), "no-such-preset"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    monkeypatch.setattr(sys, "argv", ["panoptic-ray", "train", "no-such-preset"])
    with pytest.raises(SystemExit) as end:
        main()
    assert done.returncode == end.value.code == 2
    assert done.stderr == capsys.readouterr().err
    assert done.stderr.startswith("error: unknown preset 'no-such-preset'; ")


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        command(stopped)
    assert end.value.code == 130 and "the same command goes on" in capsys.readouterr().err
