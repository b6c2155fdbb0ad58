"""Reference numbers of the query models (fixtures/queries): weights by their rule, maps, comparison."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from panoptic.segmentation import Categories

PATH = "fixtures/queries"


def arrays(shared: Callable[[str], Path], name: str) -> dict[str, np.ndarray]:
    """The arrays of a file of reference numbers."""
    with np.load(shared(f"{PATH}/{name}.npz")) as file:
        return {key: file[key] for key in file.files}


def record(shared: Callable[[str], Path], name: str) -> dict:
    """The content of a JSON file of reference numbers."""
    return json.loads(shared(f"{PATH}/{name}.json").read_text())


def weights(shared: Callable[[str], Path], keys: str, seed: int, gains: list) -> dict[str, torch.Tensor]:
    """Every weight of a published model under its published name, drawn by the fixtures' rule."""
    spec = importlib.util.spec_from_file_location("query_rules", shared(f"{PATH}/regen.py"))
    assert spec is not None and spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    drawn = rules.weights_from_keys(shared(f"{PATH}/{keys}.json"), seed, gains)
    return {key: torch.from_numpy(value) for key, value in drawn.items()}


def coco(shared: Callable[[str], Path], extra: tuple[int, ...] = ()) -> Categories:
    """COCO's 133 panoptic classes with their dataset ids, and others that a fixture takes from the unused ids."""
    meta = record(shared, "coco133_meta")
    contiguous = {**meta["thing_id_map"], **meta["stuff_id_map"]}
    entries = [
        {"id": int(i), "name": meta["names"][k], "isthing": k in meta["thing_contiguous"]}
        for i, k in contiguous.items()
    ]
    known = {entry["id"] for entry in entries}
    entries += [{"id": i, "name": f"unused {i}", "isthing": i <= 90} for i in extra if i not in known]
    return Categories.from_coco(entries)
