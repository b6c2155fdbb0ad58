"""The page of a data set: its figures and pictures are there, and no set of any kind ends it with an error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data import prepare
from pipelines.data.manifest import Manifest
from pipelines.data.readers import coco_panoptic
from pipelines.data.readers.source import Source
from pipelines.data.report import page, pictures
from pipelines.data.shard_writer import Report, write_shard
from tests.support.coco_folder import write_folder, write_json


def checked(root: Path) -> tuple[Source, Manifest]:
    """What `check` says of the split val, without Ray."""
    source = coco_panoptic(root, "val")
    rows = source.rows.append_column("shard", pa.array([0] * source.rows.num_rows))
    report = write_shard(rows, None, source.categories, source.decode, source.orientation)["report"][0].as_py()
    origin = {"reader": "coco", "root": str(root), "split": "val"}
    return source, prepare._manifest(source, origin, [Report(**json.loads(report))], "")


def test_figures_pictures_and_problems_are_on_the_page(tmp_path: Path) -> None:
    content = write_folder(tmp_path, "val", count=30)
    content["categories"][0]["name"] = "<person> & co"
    write_json(tmp_path, "val", content)
    (tmp_path / "images/val/003.jpg").write_bytes(b"")
    source, manifest = checked(tmp_path)
    text = page(manifest, pictures(source, 5))
    assert text.count("data:image/jpeg;base64,") == 10 and "&lt;person&gt; &amp; co" in text and "<person>" not in text
    assert "29 images" in text and re.search(r"<b>84</b><span>segments</span>", text)
    assert "1 images left out" in text and "003.jpg" in text and "is empty (0 bytes) → copy the file again" in text
    assert "1 classes have no segment: car." in text
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "<script" not in text


@pytest.mark.parametrize("count", [1, 2])
def test_sets_with_few_or_no_segments_have_a_page(tmp_path: Path, count: int) -> None:
    write_folder(tmp_path, "val", count=count)
    source, manifest = checked(tmp_path)
    assert "<svg" in page(manifest, pictures(source))


def test_many_sizes_are_drawn_as_fewer_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.report.POINTS", 20)
    write_folder(tmp_path, "val", count=2)
    _, manifest = checked(tmp_path)
    assert manifest.statistics is not None
    sizes = {f"{height}x{width}": 1 for height in range(100, 160) for width in (200, 250)}
    vars(manifest.statistics)["sizes"] = sizes
    text = page(manifest, [])
    points = [int(count) for count in re.findall(r"<title>\d+ x \d+: (\d+) images", text)]
    assert 2 <= len(points) <= 20 and sum(points) == 120


def test_plots_fit_a_narrow_window(tmp_path: Path) -> None:
    """A plot that is wider than its window hides its right end, where the one size of a data set stands."""
    write_folder(tmp_path, "val", count=3)
    source, manifest = checked(tmp_path)
    style, _, body = page(manifest, pictures(source)).partition("</style>")
    (least,) = re.findall(r"\.plots svg \{[^}]*min-width: (\d+)px", style)
    assert int(least) <= 320 and body.count("<svg") == body.partition('class="plots"')[2].count("<svg") == 3
