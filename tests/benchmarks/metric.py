"""Panoptic quality against panopticapi and cityscapesScripts (rows 1a, 1b, 1c) and hotcoco (row 1d)."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from panoptic.metrics.panoptic_quality import QualityCounts, count, count_coco, quality
from panoptic.png import from_coco, to_coco
from panoptic.segmentation import Categories, Segmentation
from tests.benchmarks import inputs, peers
from tests.benchmarks.timing import Case, Row
from tests.conftest import ROOT

IMAGES = 4
"""Of a round."""
DATA_SET = 40
"""Pairs of row 1d."""

PEDESTRIANS = ROOT.parent / "shared" / "data" / "pedestrians" / "annotations"
"""Maps of photographs, where the shared reference folder is at hand."""

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


def data_set_rows(size: tuple[int, int], folder: Path, peers_folder: Path | None, repeat: int) -> list[Row]:
    """Row 1d: folders of pairs of PNGs, which is what hotcoco takes; drawn ones and, where they are, photographs'.

    CPU of all its threads counts.

    Raises:
        ValueError: hotcoco's PQ differs from ours.
    """
    rng = np.random.default_rng(1)
    classes = inputs.categories(80, 53)
    sets = {"drawn": (classes, [inputs.draw_truth(rng, size, 14, 7, classes) for _ in range(DATA_SET)])}
    if PEDESTRIANS.is_dir():
        sets["pedestrians'"] = _pedestrians()
    rows = []
    for name, (categories, truths) in sets.items():
        pairs = [(truth, inputs.disturb(rng, truth, categories)) for truth in truths]
        work = f"PQ of a folder of {len(pairs)} {name} pairs of COCO PNGs, {_content(pairs)}, an image"
        rows.append(_data_set(work, pairs, categories, folder / name, peers.hotcoco(peers_folder), repeat))
    return rows


def _pedestrians() -> tuple[Categories, list[Segmentation]]:
    content = json.loads((PEDESTRIANS / "panoptic_val.json").read_text())
    classes = Categories.from_coco(content["categories"])
    files = PEDESTRIANS / "panoptic_val"
    records = content["annotations"][:DATA_SET]
    return classes, [from_coco((files / r["file_name"]).read_bytes(), r, classes, r["file_name"]) for r in records]


def _data_set(
    work: str, pairs: list[Pair], classes: Categories, folder: Path, peer: ModuleType | None, repeat: int
) -> Row:
    names = [f"{k:03d}.png" for k in range(len(pairs))]
    folders = folder / "true", folder / "predicted"
    for side in folders:
        side.mkdir(parents=True)
    files = [
        [_write(segmentation, classes, side / name) for segmentation, side in zip(pair, folders, strict=True)]
        for pair, name in zip(pairs, names, strict=True)
    ]
    images = [
        {"id": k, "file_name": name, "height": truth.size[0], "width": truth.size[1]}
        for k, (name, (truth, _)) in enumerate(zip(names, pairs, strict=True))
    ]
    listed = [
        {
            "images": images,
            "categories": classes.to_coco(),
            "annotations": [{**pair[k][1], "image_id": i, "file_name": names[i]} for i, pair in enumerate(files)],
        }
        for k in (0, 1)
    ]

    def ours() -> float:
        counts = QualityCounts.zeros(len(classes))
        for k, ((a, first), (b, second)) in enumerate(files):
            counts += count_coco((a.read_bytes(), first), (b.read_bytes(), second), classes, f"image {k}")
        return quality(counts, classes).all.pq

    def theirs() -> float:
        assert peer is not None
        evaluation = peer.PanopticEval(*listed, gt_folder=str(folders[0]), pred_folder=str(folders[1]))
        evaluation.evaluate()
        return 100 * evaluation.results()["All"]["pq"]

    runs = [ours] if peer is None else [ours, theirs]
    scores = [run() for run in runs]
    if not np.allclose(scores, scores[0], rtol=1e-9):
        raise ValueError(f"1d: PQ {scores[0]} here, {scores[1]} by hotcoco; no ratio counts before it agrees")
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repeat):
        for run, seconds in zip(runs, taken, strict=True):
            begin = time.process_time()
            run()
            seconds.append(time.process_time() - begin)
    mine, *other = (1e3 * statistics.median(seconds) / len(pairs) for seconds in taken)
    return Row("1d", work, mine, "ms", "hotcoco", other[0], other[0] / mine) if other else Row("1d", work, mine, "ms")


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
