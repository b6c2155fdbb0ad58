"""The README: its programs take its commands, its links lead somewhere, and its first steps work as written."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_lines import commands_of, parse_command

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, ROOT / "infra" / "REFERENCE.md", ROOT / "infra" / "RESULTS.md", ROOT / "CONTRIBUTING.md")

TINY = """
--model.backbone.name resnet18 --model.backbone.freeze 0 --model.rates 2 --model.aspp-channels 16
--model.semantic-projections 8 8 8 --model.instance-projections 8 8 8
--model.semantic-channels 16 --model.instance-channels 16 --model.semantic-head-channels 16
--model.instance-head-channels 8 --augment.crop 65 97 --optim.warmup-steps 0 --resize.short 96
--train.batch 4 --train.steps 2 --train.validate-every 2 --train.workers 1
"""
"""What makes the README's training one of seconds; all else in its commands stays."""


def blocks(page: Path, kind: str) -> Iterator[tuple[str, str]]:
    """The heading and the text of each fenced block of a kind."""
    heading, inside, lines = "", "", []
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            if inside == kind:
                yield heading, "\n".join(lines)
            inside, lines = ("" if inside else line.removeprefix("```").strip() or "text"), []
        elif inside:
            lines.append(line)
        elif line.startswith("#"):
            heading = line.lstrip("# ")


def commands(script: str) -> list[str]:
    """The commands of a block, one each, without comments."""
    joined = re.sub(r"\\\n\s*", " ", script)
    return [line for text in joined.splitlines() if (line := re.sub(r"\s+#.*", "", text).strip())]


def test_every_command_is_taken_by_its_program() -> None:
    found = [command for _, script in blocks(README, "sh") for command in commands(script)]
    assert len(found) > 20
    for command in found:
        for words in commands_of(command):
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
            elif not all("=" in word for word in words):
                parse_command(words)


def test_python_is_called_in_one_way() -> None:
    """In the activated environment: no command names its path, and the first block activates it."""
    text = README.read_text()
    assert ".venv/bin/python" not in text and "$ python" not in text
    heading, script = next(blocks(README, "sh"))
    assert heading == "panoptic-ray" and ". .venv/bin/activate" in script


def test_blocks_of_python_are_python() -> None:
    found = [code for _, code in blocks(README, "python")]
    assert len(found) == 2
    for code in found:
        ast.parse(code)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """To files of the project, and to headings of pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^a-z0-9 _-]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in anchors, target


def test_the_contents_name_every_section() -> None:
    text = README.read_text()
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    listed = re.findall(r"\(#([a-z0-9-]+)\)", text.split("## What you need")[0])
    assert listed == [re.sub(r"[^a-z0-9 -]", "", name.lower()).replace(" ", "-") for name in sections]
    assert len(text.split()) < 3500


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stranger_comes_from_a_folder_to_a_prediction(scenes16: Path, tmp_path: Path) -> None:
    """A copy of what is tracked, the same environment, and the commands of "Your own data" as they stand there."""
    clone = tmp_path / "panoptic-ray"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    shutil.copytree(scenes16, clone / "data")
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as `activate` does
    environment = {**os.environ, "PATH": paths}
    for name in ("PYTHONPATH", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    (script,) = (script for heading, script in blocks(README, "sh") if heading == "Your own data")
    done, said = [], []
    for command in commands(script):
        trains = "jobs/train.py" in command
        typed = f"{command} {' '.join(shlex.quote(word) for word in TINY.split())}" if trains else command
        result = subprocess.run(["bash", "-c", typed], cwd=clone, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        done.append(result.stdout)
        said.append(result.stderr)
    checked, told, trained, stood, predicted = done
    assert "16 images of split train" in checked
    assert "nothing was started and nothing written" in told and "the run is new" in told
    assert "2 steps of 4 images of data" in trained and "checkpoint" in trained
    assert trained.startswith("run first: PanopticDeepLab of ")
    for line in ("starting Ray", "opening the run in MLflow", "starting 1 worker on the CPU: each loads the model"):
        assert line in said[2], line
    assert not [part for part in ("\x1b[", "pid=") if part in trained + said[2]]
    assert "first" in stood
    assert "8 of 8 images predicted" in predicted
    assert len(list((clone / "predictions" / "overlays").iterdir())) == 8
    assert (clone / "runs" / "mlflow.db").exists()
