"""What a new user asks before the first training: the help, the flags that it names, and runs that are only told."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from jobs import prepare, train, tune
from jobs.__main__ import JOBS
from jobs.common import SPELLINGS
from pipelines import config
from pipelines.config import ALL, flatten
from pipelines.option_help import ORDER, USUAL, walk
from pipelines.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]

FLAG = re.compile(r"(?<![\w./-])--[a-z][\w.-]*\w")
"""A long option in a text."""

OTHERS = {
    *("--list", "--dry-run", ALL, "--help"),  # of jobs/train.py, beside the options of an experiment
    *("--id", "--carry", "--working-dir"),  # of submitting, with Ray's own
    *("--build", "--detach", "--profile", "--option", "--extra"),  # of docker, and the one that stands for any
    *("--backend-store-uri", "--host", "--port"),  # of MLflow
}
"""Flags that texts name and that no parser of ours lists."""


def shown(job: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The help that a job prints."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"jobs.{job}").main(arguments)
    assert end.value.code in (0, None)
    return capsys.readouterr().out


def option_paths() -> set[str]:
    """Every option of every preset, as it is typed."""
    return {f"--{path.replace('_', '-')}" for make in PRESETS.values() for path, _ in walk(make())}


def test_the_usual_options_come_first_and_all_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    usual, everything = (shown("train", ["demo", flag], capsys) for flag in ("--help", "--help-all"))
    typed = [f"--{path.replace('_', '-')}" for path in USUAL]
    assert len(typed) == 20 and re.findall(r"^  (--\S+)", usual, re.MULTILINE) == typed
    assert len(usual.splitlines()) < 90
    listed = re.findall(r"^  --(\S+)", everything, re.MULTILINE)
    assert sorted(listed) == sorted(path.replace("_", "-") for path in flatten(PRESETS["demo"]()))
    groups = list(dict.fromkeys(path.split(".")[0] if "." in path else "" for path in listed))
    assert groups == list(ORDER)
    assert groups.index("data") < groups.index("train") < groups.index("optim") < groups.index("augment")


def test_help_shows_the_values_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown("train", ["detr-r50-coco", "--help"], capsys)
    assert "Preset detr-r50-coco" in text and "--model.backbone.name resnet50" in text
    assert "--engine.precision float32   (float32 | bfloat16 | float16)" in text


MANY = ("evaluate", "oracle", "independent", "prepare", "tune")
"""Jobs with so many options that --help shows the usual ones alone."""


@pytest.mark.parametrize("job", MANY)
def test_other_jobs_too_show_the_usual_options_first(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    usual, everything = (shown(job, [flag], capsys) for flag in ("--help", "--help-all"))
    heads = re.compile(r"^  (--\S+|[A-Z]+$)", re.MULTILINE)
    first, listed = heads.findall(usual), heads.findall(everything)
    assert len(first) == len(importlib.import_module(f"jobs.{job}").USUAL) <= 24 and set(first) < set(listed)
    assert len(usual.splitlines()) < 90 and "--help-all" in usual
    groups = list(dict.fromkeys(head[2:].split(".")[0] if "." in head else "" for head in listed))
    assert groups == [group for group in ORDER if group in groups] and groups[0] == ""


@pytest.mark.parametrize("job", sorted(JOBS.keys() - {"train"}))
def test_the_options_that_help_lists_are_those_that_are_taken(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the parser's own help, which names each option as it takes it."""
    listed = re.findall(r"^  (--\S+)", shown(job, ["--help-all"], capsys), re.MULTILINE)
    with pytest.raises(SystemExit):
        config.parse_words(importlib.import_module(f"jobs.{job}").Options, ["--help"], "")
    taken = re.findall(
        r"^[│ ] {1,2}(?:-h, )?(--[a-z][\w.-]*)", re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out), re.MULTILINE
    )
    assert sorted(listed) == sorted({*taken} - {"--help"})


def test_no_help_text_names_a_flag_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    of_jobs = {flag for job in JOBS for flag in FLAG.findall(shown(job, ["--help-all"], capsys))}
    options = option_paths()
    known = options | of_jobs | OTHERS
    for name, make in PRESETS.items():
        texts = {name: str(make.__doc__), **{path: text for path, (_, _, text) in walk(make())}}
        for place, text in texts.items():
            named = set(FLAG.findall(text))
            assert named <= options, (place, named - options)
    for job in JOBS:
        unknown = set(FLAG.findall(str(importlib.import_module(f"jobs.{job}").__doc__))) - known
        assert not unknown, (job, unknown)


def test_the_readme_names_no_flag_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    of_jobs = {flag for job in JOBS for flag in FLAG.findall(shown(job, ["--help-all"], capsys))}
    known = option_paths() | of_jobs | OTHERS | {"--verify"}
    for number, line in enumerate((ROOT / "README.md").read_text().splitlines(), 1):
        for flag in FLAG.findall(line):
            group = f"{flag}."  # as in --augment.*
            assert flag in known or any(one.startswith(group) for one in known), f"README.md:{number}: {flag}"


def test_former_names_stand_in_no_text() -> None:
    texts = [(ROOT / "README.md").read_text(), *(str(make.__doc__) for make in PRESETS.values())]
    for former in SPELLINGS:
        assert not [text[:80] for text in texts if re.search(rf"{former}(?![.\w-])", text)], former


def test_a_dry_run_tells_everything_and_writes_nothing(
    scenes16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--data.root", str(scenes16), "--dry-run", "--name", "a", "--train.steps", "7"]) is None
    text = capsys.readouterr().out
    assert "\ntrain.steps 7\n" in text and "\nmodel.backbone.name resnet10t\n" in text
    assert re.search(r"whole model +5,\d{3},\d{3}", text)
    assert "train 16 images of split train" in text and "val   8 images of split val" in text
    assert "7 of 7 steps of 8 images: 2 workers" in text
    assert f"{tmp_path}/runs/a: at most" in text and f"sqlite:///{tmp_path}/runs/mlflow.db" in text
    assert "the run is new" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_training_would_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"train\.batch 8 cannot be shared by 3 workers"):
        train.main(["demo", "--train.workers", "3", "--dry-run"])


def test_a_sweep_and_a_study_that_are_only_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ["demo", "--sweep", "optim.lr=loguniform(1e-5,1e-3)", "optim.ema=grid(0,0.9)", "--samples", "3"]
    tune.main([*sweep, "--dry-run", "--name", "s", "--train.steps", "9"])
    text = capsys.readouterr().out
    assert "6 trials of 9 steps" in text and "optim.lr = loguniform(1e-05, 0.001)" in text
    assert f"folder   {tmp_path}/runs/s" in text
    tune.main(["--study", "aspp", "--small", "--dry-run", "--name", "t", "--steps", "9"])
    text = capsys.readouterr().out
    assert "2 rows under their seeds, 2 trainings" in text and "aspp" in text and "9 steps" in text
    assert list(tmp_path.iterdir()) == []


def test_a_mistyped_study_is_told_its_near_names() -> None:
    with pytest.raises(ValueError, match=r"--study freezing-r05: unknown; near: freezing-r50, freezing-r101, "):
        tune.main(["--study", "freezing-r05"])


def test_a_preparation_that_is_only_told(
    scenes16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data.root", str(scenes16), "--data.split", "val", "--dry-run"]
    assert prepare.main([*data, "--out", "shards/val"]) is None
    text = capsys.readouterr().out
    assert "8 images of split val" in text and f"would write 8 rows to {tmp_path}/shards/val" in text
    assert "classes of things: " in text and list(tmp_path.iterdir()) == []
    prepare.main([*data, "--out", "o", "--augment.copies", "2"])
    assert "would write 24 rows" in capsys.readouterr().out
