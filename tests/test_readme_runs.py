"""Every command and every program of README.md is run, small, in its order, in which they build on each other.

They run in a copy of what is tracked, beside a drawn data set: the training and the first prediction of "Your own data"
as a stranger would, as processes of their own; all else by the `main` of its job in this process, on their results.
"""

from __future__ import annotations

import importlib
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_lines import commands_of
from tests.support.readme import README, ROOT, blocks, commands

SMALL = """
--model.backbone.name test_resnet --model.backbone.freeze 0 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --optim.warmup-steps 0 --resize.short 96
--train.batch 4 --train.steps 2 --train.validate-every 2 --train.workers 1
--tracking.register street --tracking.alias champion
"""
"""Makes the README's training one of seconds, and registers its model under the name that later commands have."""

RUN = {
    "make demo": ("--dry-run", "dry run of demo: nothing was started"),
    "python jobs/prepare.py": ("", "images of split"),
    "python jobs/train.py --list": ("", "mask2former-pedestrians"),
    "python jobs/train.py panoptic-deeplab-pedestrians": (SMALL, "2 steps of 4 images"),
    "python jobs/train.py mask2former-pedestrians --help": ("", "--train.steps"),
    "python jobs/train.py mask2former-pedestrians-imagenet": ("--dry-run", "nothing was started and nothing written"),
    "python jobs/train.py mask2former-pedestrians": ("--dry-run", "nothing was started and nothing written"),
    "python jobs/train.py panoptic-fpn-pedestrians": ("--dry-run", "nothing was started and nothing written"),
    "python jobs/status.py": ("", "first"),
    "python jobs/predict.py": ("--actors 0", "8 of 8 images predicted"),
    "python jobs/evaluate.py runs": ("--actors 0", "on 8 images of val"),
    "python jobs/evaluate.py models": ("--actors 0", "street"),
    "python jobs/oracle.py": ("--actors 0", "| semantic | centre | offset "),
    "python jobs/tune.py": ("--dry-run", "dry run: nothing was started and nothing written"),
    "python jobs/export.py": ("", "network.onnx"),
    "python -m panoptic.runtime": ("", "segments in"),
}
"""By the beginning of a command: the options that make it small, and what is printed then.

One training is run; others, and the trials of sweeps and studies, are told (--dry-run), as each takes half a minute of
a core: tests/panoptic/models trains every architecture, tests/pipelines/tuning and studies run trials.
"""

NOT_RUN = {
    "python jobs/train.py mask2former-pedestrians-imagenet --data.root other": "begins from the line before it",
    "python jobs/train.py mask2former-r50-coco": "starts from published weights, which must be downloaded",
    "mlflow ui": "a server that runs until it is stopped",
    "python jobs/serve.py": "a server that runs until it is stopped; tests/pipelines/serving asks it",
    "python jobs/submit.py": "needs a cluster's job server: tests/jobs/test_submit.py, make cluster",
}
"""By the beginning of a command: why no test runs it as it stands. Its words are parsed in tests/test_readme.py."""

PROCESSES = (
    "python jobs/train.py panoptic-deeplab-pedestrians --data.root data --name first",
    "python jobs/predict.py",
)
"""Commands of "Your own data" that run as processes of their own."""

PLACES = {"s3://bucket/": "", "http://MLFLOW:5000": "sqlite:///runs/mlflow.db"}
"""Places of a cluster, and those that stand for them here."""


def beginning(command: str) -> str:
    """The longest key of the tables above that a command begins with; "" where there is none."""
    return max((key for key in (*RUN, *NOT_RUN) if f"{command} ".startswith(key)), key=len, default="")


def found() -> list[tuple[str, str]]:
    """Each command of the README with its section, without those that only set variables or the environment."""
    listed = [(heading, command) for heading, script in blocks(README, "sh") for command in commands(script)]
    return [(heading, command) for heading, command in listed if any(commands_of(command))]


def test_each_command_is_run_or_said_why_not() -> None:
    keys = {beginning(command): command for _, command in found()}
    assert "" not in keys, f"neither in RUN nor in NOT_RUN: {keys['']}"
    assert keys.keys() == {*RUN, *NOT_RUN}, "a key that no command of the README begins with"
    assert len(NOT_RUN) < 6


@pytest.fixture
def copy(scenes16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of what is tracked, which is the working directory, and photographs; no store is named anywhere."""
    folder = tmp_path / "panoptic-ray"
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(scenes16, folder / "data")
    shutil.copytree(scenes16 / "images" / "val", folder / "photographs")
    shutil.copy(min((folder / "photographs").iterdir()), folder / "photo.jpg")
    monkeypatch.chdir(folder)
    yield folder
    forget_store()


def forget_store() -> None:
    """Undo the naming of an MLflow store, which MLflow keeps in the environment, too."""
    import mlflow

    mlflow.set_tracking_uri("")
    mlflow.set_registry_uri("")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)


def as_a_process(folder: Path, command: str) -> tuple[str, str]:
    """What a command prints, and what it says on stderr, in the activated environment and nothing else of ours."""
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": paths}
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def in_this_process(command: str) -> None:
    """Run a command by the `main` of its job."""
    words = shlex.split(command)
    if words[0] == "make":
        recipe = re.search(rf"^{words[1]}:.*\n\t\$\(PYTHON\) (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert recipe is not None, f"make {words[1]}: no Python program"
        words = ["python", *shlex.split(recipe[1]), *words[2:]]
    program = "panoptic.runtime.__main__" if words[1] == "-m" else f"jobs.{Path(words[1]).stem}"
    try:
        importlib.import_module(program).main(words[3 if words[1] == "-m" else 2 :])
    except SystemExit as end:
        assert not end.code, command


def challenge(store: str) -> None:
    """Register the model of "street" once more, as its challenger."""
    import mlflow

    mlflow.set_tracking_uri(store)
    client = mlflow.MlflowClient()
    first = client.get_model_version_by_alias("street", "champion")
    assert first.source is not None
    second = client.create_model_version("street", first.source, first.run_id)
    client.set_registered_model_alias("street", "challenger", second.version)
    forget_store()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_and_every_program(ray_cluster: None, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    walked = []
    for heading, command in found():
        key = beginning(command)
        if key in NOT_RUN:
            continue
        if key == "python jobs/evaluate.py models":
            challenge("sqlite:///runs/mlflow.db")
        options, expected = RUN[key]
        typed = f"{command} {' '.join(options.split())}"
        for place, stand_in in PLACES.items():
            typed = typed.replace(place, stand_in)
        if heading == "Your own data" and command.startswith(PROCESSES) and "--dry-run" not in command:
            printed, said = as_a_process(copy, typed)
            walked.append((printed, said))
        else:
            in_this_process(typed)
            printed = capsys.readouterr().out
        assert expected in printed, f"{typed}\n{printed}"
    (trained, told), (predicted, _) = walked
    assert "checkpoint" in trained and trained.startswith("run first: PanopticDeepLab of ")
    for line in ("starting Ray", "opening the run in MLflow", "starting 1 worker on the CPU: each loads the model"):
        assert line in told, line
    assert not [part for part in ("\x1b[", "pid=") if part in trained + told]
    assert "coco, overlay in predictions" in predicted
    assert len(list((copy / "predictions" / "overlays").iterdir())) == 8
    assert (copy / "runs" / "mlflow.db").exists() and list((copy / "evaluations").iterdir())

    (copy / "photo-segmented.jpg").unlink()
    for number, (_, code) in enumerate(blocks(README, "python")):
        file = copy / f"block-{number}.py"
        file.write_text(re.sub(r'load\("runs/[^"]+"\)', 'load("runs/first")', code))
        found_names = runpy.run_path(str(file))
        assert "segmented" in found_names or (copy / "photo-segmented.jpg").exists()
    assert list(found_names["frame"].columns)[:2] == ["png", "segments"]
