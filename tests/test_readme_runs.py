"""Every command and every program of README.md is run, small, in its order, in which they build on each other.

They run in a copy of what is tracked, beside a drawn data set: the training and the first prediction of "Your own data"
as a stranger would, as processes of their own, and servers, which are asked and stopped; all else by the `main` of its
job in this process, on their results.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
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

SIZE = """
--train.batch 4 --train.workers 1 --train.overlays 1 --optim.warmup-steps 0 --augment.crop 64 96 --resize.short 64
"""
SHORT = f"--train.steps 2 --train.validate-every 2 {SIZE}"
"""The same for trainings of whole models."""

POPULATION = f"{SHORT} --samples 2"
TRIAL = f"{SHORT} --samples 1"
ROWS = f"--steps 2 --seeds 1 {SIZE}"

RUN = {
    "make demo": (f"{SHORT} --data.scenes.train 8 --data.scenes.val 4", "demo-"),
    "python jobs/prepare.py": ("", "images of split"),
    "python jobs/train.py --list": ("", "mask2former-pedestrians"),
    "python jobs/train.py panoptic-deeplab-pedestrians": (SMALL, "2 steps of 4 images"),
    "python jobs/train.py mask2former-pedestrians --help": ("", "--train.steps"),
    "python jobs/train.py mask2former-pedestrians-imagenet": (SHORT, "mine: best checkpoint, on 8 images of val"),
    "python jobs/train.py mask2former-pedestrians-imagenet --data.root other": (SHORT, "next: best checkpoint"),
    "python jobs/train.py mask2former-pedestrians": (SHORT, "best checkpoint, on 8 images of val"),
    "python jobs/train.py panoptic-fpn-pedestrians": (SHORT, "best checkpoint, on 8 images of val"),
    "python jobs/train.py mask2former-r50-coco": (f"{SHORT} --train.gpu no", "best checkpoint, on 8 images of val"),
    "python jobs/status.py": ("", "first"),
    "python jobs/predict.py": ("--actors 0", "8 of 8 images predicted"),
    "python jobs/evaluate.py runs": ("--actors 0", "on 8 images of val"),
    "python jobs/evaluate.py models": ("--actors 0", "street"),
    "python jobs/oracle.py": ("--actors 0", "| semantic | centre | offset "),
    "python jobs/tune.py demo": (f"{TRIAL} --data.scenes.train 8 --data.scenes.val 4", "2 trials: 2 finished"),
    "python jobs/tune.py panoptic": (TRIAL, "1 trials: 1 finished"),
    "python jobs/tune.py panoptic-deeplab-pedestrians-imagenet --data.root data --name thawing": (
        POPULATION,
        "2 trials: 2 finished",
    ),
    "python jobs/tune.py --study": (ROWS, "frozen"),
    "python jobs/export.py": ("", "network.onnx"),
    "python -m panoptic.runtime": ("", "segments in"),
}
"""By the beginning of a command: the options that make it small, and what is printed then."""

SERVERS = {
    "mlflow ui": ("--port {port}", "/health", "OK"),
    "python jobs/serve.py": ("--port {port}", "/health", "street"),
}
"""Commands that serve until they are stopped: their options, what they are asked, and what is in the answer."""

ELSEWHERE = {"python jobs/submit.py": "tests/jobs/test_submit.py runs them, on a cluster of its own"}
"""By the beginning of a command: where it is run as it stands."""

PROCESSES = (
    "python jobs/train.py panoptic-deeplab-pedestrians --data.root data --name first",
    "python jobs/predict.py runs",
    "python jobs/train.py mask2former-r50-coco",
)
"""Commands that run as processes of their own, as a stranger's do; the last since its workers look in the cache."""

PLACES = {"s3://bucket/": "", "http://MLFLOW:5000": "sqlite:///runs/mlflow.db"}
"""Places of a cluster, and those that stand for them here."""


def beginning(command: str) -> str:
    """The longest key of the tables above that a command begins with; "" where there is none."""
    return max((key for key in (*RUN, *SERVERS, *ELSEWHERE) if f"{command} ".startswith(key)), key=len, default="")


def found() -> list[tuple[str, str]]:
    """Each command of the README with its section, without those that only set variables or the environment."""
    listed = [(heading, command) for heading, script in blocks(README, "sh") for command in commands(script)]
    return [(heading, command) for heading, command in listed if any(commands_of(command))]


def test_each_command_is_run_or_said_why_not() -> None:
    keys = {beginning(command): command for _, command in found()}
    assert "" not in keys, f"in none of RUN, SERVERS and ELSEWHERE: {keys['']}"
    assert keys.keys() == {*RUN, *SERVERS, *ELSEWHERE}, "a key that no command of the README begins with"


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
    other_classes(scenes16, folder / "other")
    weights_in_the_cache("mask2former-r50-coco", folder / "cache", monkeypatch)
    shutil.copytree(scenes16 / "images" / "val", folder / "photographs")
    shutil.copy(min((folder / "photographs").iterdir()), folder / "photo.jpg")
    monkeypatch.chdir(folder)
    yield folder
    forget_store()


def other_classes(data: Path, folder: Path) -> None:
    """The same photographs, of which one class has another name."""
    shutil.copytree(data, folder)
    for file in (folder / "annotations").glob("*.json"):
        content = json.loads(file.read_text())
        content["categories"][0]["name"] = "another"
        file.write_text(json.dumps(content))


def weights_in_the_cache(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in place of published ones, as they lie on a machine that has used them before."""
    from panoptic.classes import classes
    from panoptic.convert import hub
    from panoptic.training import checkpoint
    from pipelines.presets import PRESETS

    monkeypatch.setenv(hub.CACHE, str(cache))
    config = PRESETS[name]().model
    file = cache / name / f"checkpoint-v{hub.VERSION}.pt"
    file.parent.mkdir(parents=True)
    checkpoint.save(str(file), config=config, model=config.build(classes("coco")))


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


def ask(folder: Path, command: str, path: str) -> str:
    """What a server answers, which is started by a command in the activated environment and stopped by Ctrl-C."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    words = shlex.split(command.format(port=port))
    log = (folder / "server.log").open("w+")
    server = subprocess.Popen(words, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                    return answer.read().decode()
            except OSError:
                assert server.poll() is None and time.monotonic() < until, Path(log.name).read_text()
                time.sleep(0.3)
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(60)
        finally:
            log.close()
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


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


def walk(copy: Path, listed: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """Run commands of the README in turn; by their beginnings, what those that were processes printed and said."""
    walked = {}
    for command in listed:
        key = beginning(command)
        if key in ELSEWHERE:
            continue
        if key in SERVERS:
            options, path, expected = SERVERS[key]
            assert expected in ask(copy, f"{command} {options}", path)
            continue
        if key == "python jobs/evaluate.py models":
            challenge("sqlite:///runs/mlflow.db")
        options, expected = RUN[key]
        typed = f"{command} {' '.join(options.split())}"
        for place, stand_in in PLACES.items():
            typed = typed.replace(place, stand_in)
        if command.startswith(PROCESSES) and "--dry-run" not in command:
            walked[key] = as_a_process(copy, typed)
            printed = walked[key][0]
        else:
            in_this_process(typed)
            printed = capsys.readouterr().out
        assert expected in printed, f"{typed}\n{printed}"
    return walked


def run_programs(copy: Path) -> None:
    """Run each Python program of the README on the run "first"."""
    for number, (_, code) in enumerate(blocks(README, "python")):
        file = copy / f"block-{number}.py"
        file.write_text(re.sub(r'load\("runs/[^"]+"\)', 'load("runs/first")', code))
        found_names = runpy.run_path(str(file))
        assert "segmented" in found_names or (copy / "photo-segmented.jpg").exists()
    assert list(found_names["frame"].columns)[:2] == ["png", "segments"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stranger_trains_on_own_data(ray_cluster: None, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The section of own data, to a trained model and a prediction, and the programs, which use that model."""
    walked = walk(copy, [command for heading, command in found() if heading == "Your own data"], capsys)
    trained, told = walked["python jobs/train.py panoptic-deeplab-pedestrians"]
    predicted, _ = walked["python jobs/predict.py"]
    assert "checkpoint" in trained and trained.startswith("run first: PanopticDeepLab of ")
    for line in ("starting Ray", "opening the run in MLflow", "starting 1 worker on the CPU: each loads the model"):
        assert line in told, line
    assert not [part for part in ("\x1b[", "pid=") if part in trained + told]
    assert "coco, overlay in predictions" in predicted
    assert len(list((copy / "predictions" / "overlays").iterdir())) == 8
    assert (copy / "runs" / "mlflow.db").exists()
    run_programs(copy)


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_every_command_and_every_program(ray_cluster: None, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    walk(copy, [command for _, command in found()], capsys)
    assert list((copy / "evaluations").iterdir())
    (copy / "photo-segmented.jpg").unlink()
    run_programs(copy)
