"""The README: its programs take its commands, its links lead somewhere. tests/test_readme_runs.py runs them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.command_lines import commands_of, parse_command
from tests.support.readme import README, ROOT, blocks, commands

PAGES = (README, ROOT / "infra" / "REFERENCE.md", ROOT / "infra" / "RESULTS.md", ROOT / "CONTRIBUTING.md")


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
