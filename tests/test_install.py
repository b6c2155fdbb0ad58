"""Packages that a fresh machine installs: the lock, the metadata, a torch and a torchvision that fit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.markers import Marker, default_environment
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "infra" / "requirements.lock"
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins() -> list[tuple[Requirement, int]]:
    """Each requirement of the lock with its number of hashes."""
    entries = re.split(r"\n(?=\S)", LOCK.read_text(encoding="utf-8"))
    lines = [entry.replace("\\\n", " ") for entry in entries if not entry.startswith("#")]
    return [(Requirement(re.split(r"\s--hash|\n", line)[0].strip()), line.count("--hash=sha256:")) for line in lines]


def environment(python: str, platform: str, machine: str) -> dict[str, str]:
    """The marker variables of another machine."""
    return {
        **{key: str(value) for key, value in default_environment().items()},
        "python_version": python,
        "python_full_version": f"{python}.4",
        "sys_platform": platform,
        "platform_system": platform.capitalize(),
        "platform_machine": machine,
    }


def test_the_lock_names_no_registry():
    text = LOCK.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*(-i|-f|--(extra-)?index-url|--find-links|--trusted-host)\b", text, re.MULTILINE)


def test_the_lock_pins_and_hashes_everything(pins: list[tuple[Requirement, int]]):
    assert len(pins) > 100
    loose = [str(pin) for pin, hashes in pins if hashes == 0 or [s.operator for s in pin.specifier] != ["=="]]
    assert loose == []


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize(("platform", "machine"), PLATFORMS)
def test_the_lock_satisfies_the_project(
    project: dict, pins: list[tuple[Requirement, int]], python: str, platform: str, machine: str
):
    """One pin a package for this Python and platform, inside the bounds of the project and of every extra."""
    markers = environment(python, platform, machine)
    versions: dict[str, Version] = {}
    for pin, _ in pins:
        if pin.marker is None or Marker(str(pin.marker)).evaluate(markers):
            assert pin.name not in versions, f"{pin.name} is pinned twice"
            versions[pin.name] = Version(next(iter(pin.specifier)).version)
    wanted = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    for requirement in map(Requirement, wanted):
        assert requirement.name in versions, f"{requirement.name} is not in the lock"
        assert versions[requirement.name] in requirement.specifier, f"{requirement} but {versions[requirement.name]}"


def test_the_metadata(project: dict):
    assert project["name"] == "panoptic-ray"
    assert project["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    supported = Requirement(f"python{project['requires-python']}").specifier
    assert [v for v in ("3.10", *PYTHONS, "3.14") if supported.contains(f"{v}.1")] == list(PYTHONS)


def test_bounds_are_lower_bounds(project: dict):
    """An upper bound would forbid the torch that a GPU machine already has."""
    operators = {s.operator for line in project["dependencies"] for s in Requirement(line).specifier}
    assert operators <= {">=", "!="}
    torch, vision = (Requirement(line) for line in project["dependencies"][:2])
    assert torch.specifier.contains("2.11.0") and vision.specifier.contains("0.26.0")


def test_torchvision_fits_torch():
    import torch
    from torchvision.ops import nms

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]])
    assert nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]


def test_ci_runs_the_three_targets():
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    commands = [line for line in run.read_text(encoding="utf-8").splitlines() if line.startswith("make ")]
    assert commands == ["make check", "make test", "make slow"]


def test_an_unsuitable_python_is_refused_with_the_remedy(tmp_path: Path):
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(
        ["make", f"VENV={tmp_path / 'venv'}", f"BASE_PYTHON={old}", str(tmp_path / "venv" / "bin" / "uv")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr and "BASE_PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def tracked() -> list[str]:
    """Files that git tracks, so that one that was left out of a commit is missed here and not by a user."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of what git tracks."""
    tree, wheels = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheels")
    for name in tracked():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", wheels, tree]
    subprocess.run(build, check=True, capture_output=True)
    (file,) = wheels.glob("*.whl")
    return file


@pytest.mark.slow  # the build takes seconds
def test_the_wheel_holds_the_packages_the_command_and_the_licence(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = {name for name in tracked() if name.split("/")[0] in ("panoptic", "pipelines", "jobs")}
    assert names == packages  # tables and class maps, too
    assert any(name.endswith("licenses/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


DEMO = """
--data.scenes.train 8 --data.scenes.val 2 --model.backbone.name resnet18 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8 --model.semantic-channels 16
--model.instance-channels 16 --model.semantic-head-channels 16 --model.instance-head-channels 8 --augment.crop 65 97
--optim.warmup-steps 0 --resize.short 96 --train.batch 4 --train.steps 2 --train.validate-every 2 --train.workers 1
"""
"""What makes the demo one of seconds."""


@pytest.mark.nightly  # a training in an environment of its own
@pytest.mark.timeout(400)
def test_the_wheel_runs_the_demo_outside_of_the_repository(wheel: Path, tmp_path: Path):
    """In an environment that has this one's other packages, from a folder without code."""
    venv, here = tmp_path / "venv", tmp_path / "somewhere"
    here.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install", "--quiet", "--no-deps"]
    # what is installed already is this repository, which pip would take for the same package
    subprocess.run([*pip, "--no-index", "--ignore-installed", wheel], check=True, capture_output=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MLFLOW_TRACKING_URI")}
    environment["PATH"] = os.pathsep.join([str(venv / "bin"), os.environ["PATH"]])

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    code = """
import panoptic, jobs.tune, pipelines.data.class_map
pipelines.data.class_map.load("coco-things")
jobs.tune.main(["--study", "list"])
print(panoptic.__file__, jobs.__file__, pipelines.__file__)
"""
    *studies, places = run("python", "-c", code).splitlines()
    assert any("freezing-r50" in line for line in studies)
    assert all(place.startswith(str(site)) for place in places.split())
    assert "train, validate, track" in run("panoptic-ray", "--help")
    told = run("panoptic-ray", "train", *DEMO.split(), "--name", "demo")
    assert "2 steps of 4 images" in told and (here / "runs" / "mlflow.db").exists()
