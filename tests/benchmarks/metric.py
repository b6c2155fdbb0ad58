"""Panoptic quality of one image against panopticapi and cityscapesScripts (rows 1a, 1b, 1c)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from panoptic.metrics.panoptic_quality import QualityCounts, count, count_coco
from panoptic.png import from_coco, to_coco
from panoptic.segmentation import Categories, Segmentation
from tests.benchmarks import inputs, peers
from tests.benchmarks.timing import Case

IMAGES = 4
"""Of a round."""

Pair = tuple[Segmentation, Segmentation]


def cases(names: Sequence[str], size: tuple[int, int], folder: Path, peers_folder: Path | None) -> list[Case]:
    """The cases among 1a, 1b and 1c that are wanted.

    Args:
        names: of rows.
        size: (H, W).
        folder: where PNGs may be written.
        peers_folder: of the clones.
    """
    rng = np.random.default_rng(1)
    classes = inputs.categories(80, 53)
    truths = [inputs.draw_truth(rng, size, 14, 7, classes) for _ in range(IMAGES)]
    pairs = [(truth, inputs.disturb(rng, truth, classes)) for truth in truths]
    make = {"1b": _in_memory, "1c": _from_prediction}
    # a module for each, as 1b changes its own
    found = [make[name](pairs, classes, folder, peers.panopticapi(peers_folder)) for name in names if name in make]
    if "1a" in names:
        official = {"panopticapi": peers.panopticapi(peers_folder), "cityscapesScripts": peers.cityscapes(peers_folder)}
        found.insert(0, _from_files(pairs, classes, folder, official))
    return found


def _from_files(
    pairs: list[Pair], classes: Categories, folder: Path, official: Mapping[str, ModuleType | None]
) -> Case:
    truths = [_write(truth, classes, folder / f"truth-{k}.png") for k, (truth, _) in enumerate(pairs)]
    predictions = [_write(found, classes, folder / f"prediction-{k}.png") for k, (_, found) in enumerate(pairs)]

    def ours(k: int) -> QualityCounts:
        (a, first), (b, second) = truths[k], predictions[k]
        return count_coco((a.read_bytes(), first), (b.read_bytes(), second), classes, f"image {k}")

    def theirs(peer: ModuleType) -> Callable[[int], Any]:
        return lambda k: _evaluate(peer, truths[k][1], predictions[k][1], folder, classes)

    found = {name: theirs(peer) for name, peer in official.items() if peer is not None}
    return _case("1a", f"PQ from two COCO PNGs, {_content(pairs)}", ours, found, classes)


def _in_memory(pairs: list[Pair], classes: Categories, folder: Path, peer: ModuleType | None) -> Case:
    def ours(k: int) -> QualityCounts:
        truth, prediction = pairs[k]
        return count(truth, prediction, classes)

    maps = {f"{kind}-{k}": pair[i].segments for k, pair in enumerate(pairs) for i, kind in enumerate("tp")}
    records = [
        [_record(s, classes, f"{kind}-{k}") for s, kind in zip(p, "tp", strict=True)] for k, p in enumerate(pairs)
    ]
    if peer is not None:
        # its arithmetic alone: what it would open as a picture is the map itself
        peer.Image = SimpleNamespace(open=lambda path: maps[Path(path).name])  # type: ignore[attr-defined]
        peer.rgb2id = lambda ids: ids  # type: ignore[attr-defined]

    def theirs(k: int) -> Any:
        truth, prediction = records[k]
        return _evaluate(peer, truth, prediction, folder, classes)

    found = {} if peer is None else {"panopticapi": theirs}
    return _case("1b", f"PQ of maps in memory, {_content(pairs)}", ours, found, classes)


def _from_prediction(pairs: list[Pair], classes: Categories, folder: Path, peer: ModuleType | None) -> Case:
    truths = [_write(truth, classes, folder / f"truth-{k}.png") for k, (truth, _) in enumerate(pairs)]
    records = [_record(found, classes, f"written-{k}.png") for k, (_, found) in enumerate(pairs)]
    utils = peers.panopticapi_utils(peer) if peer is not None else None

    def ours(k: int) -> QualityCounts:
        path, record = truths[k]
        return count(from_coco(path.read_bytes(), record, classes, path.name), pairs[k][1], classes)

    def theirs(k: int) -> Any:
        assert utils is not None
        with io.BytesIO() as out:  # as detectron2's COCOPanopticEvaluator does
            Image.fromarray(utils.id2rgb(pairs[k][1].segments)).save(out, format="PNG")
            (folder / records[k]["file_name"]).write_bytes(out.getvalue())
        return _evaluate(peer, truths[k][1], records[k], folder, classes)

    work = f"PQ of a prediction in memory and a COCO PNG, {_content(pairs)}"
    return _case("1c", work, ours, {} if peer is None else {"detectron2: write PNG, panopticapi": theirs}, classes)


def _case(
    name: str,
    work: str,
    ours: Callable[[int], QualityCounts],
    theirs: Mapping[str, Callable[[int], Any]],
    classes: Categories,
) -> Case:
    def compare(mine: QualityCounts, other: Any) -> None:
        for k, identity in enumerate(classes.ids):
            found = other.pq_per_cat[identity]
            mine_of_class = (mine.iou[k], mine.tp[k], mine.fp[k], mine.fn[k])
            if mine_of_class != (found.iou, found.tp, found.fp, found.fn):
                raise ValueError(f"class {identity}: ours {mine_of_class}, theirs {vars(found)}")

    return Case(name, work, ours, theirs, dict.fromkeys(theirs, compare), IMAGES)


def _evaluate(peer: ModuleType | None, truth: Mapping, prediction: Mapping, folder: Path, classes: Categories) -> Any:
    """panopticapi's counts of one image, without what it prints."""
    assert peer is not None
    known = {entry["id"]: entry for entry in classes.to_coco()}
    with contextlib.redirect_stdout(io.StringIO()):
        return peer.pq_compute_single_core(0, [(truth, prediction)], str(folder), str(folder), known)


def _record(segmentation: Segmentation, classes: Categories, name: str) -> dict:
    return to_coco(segmentation, classes, 1, name)[1]


def _write(segmentation: Segmentation, classes: Categories, path: Path) -> tuple[Path, dict]:
    """A PNG as COCO's own are: ids that use all three channels, written by PIL."""
    record = _record(segmentation, classes, path.name)
    for info in record["segments_info"]:
        info["id"] *= 70_001
    ids = segmentation.segments.astype(np.int32) * 70_001
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(path)
    return path, record


def _content(pairs: list[Pair]) -> str:
    height, width = pairs[0][0].size
    counts = [len(truth.labels) for truth, _ in pairs]
    return f"{width}x{height}, {sum(counts) / len(counts):.0f} segments"
