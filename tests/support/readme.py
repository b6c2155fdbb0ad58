"""The code blocks of a Markdown page, and the commands of those that are shell."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


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
