"""The classes of public data sets, as their owners publish them; each file names its source."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from panoptic.segmentation import Categories


@cache
def table(name: str) -> dict[str, Any]:
    """The content of `NAME.json`: `source`, `categories`, and what else the format needs."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))


def classes(name: str) -> Categories:
    """The classes of `NAME.json`, in the order of the file."""
    return Categories.from_coco(table(name)["categories"], f"{name}.json")
