"""The oracle job on a model that was never trained: with everything true nothing is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.oracle import main
from panoptic.models import Architecture
from panoptic.segmentation import Categories
from panoptic.training import checkpoint
from tests.support.small import SMALL_DEEPLAB, SMALL_DETR, SMALL_FCN


def stored(folder: Path, config: Architecture, root: Path) -> str:
    """A checkpoint of random weights for the classes of the folder `root`."""
    content = json.loads((root / "annotations" / "panoptic_val.json").read_text())
    categories = Categories.from_coco(content["categories"])
    torch.manual_seed(0)
    file = folder / "model.pt"
    checkpoint.save(
        str(file),
        config=config,
        model=config.build(categories),
        experiment={"train.validation_batch": 2, "resize.short": 0},
    )
    return str(file)


@pytest.mark.nightly
def test_the_tables_of_both_models(
    ray_cluster: None, scenes16: Path, mlflow_store: str, tmp_path: Path, capsys
) -> None:
    shards = str(tmp_path / "shards")
    model = stored(tmp_path, SMALL_FCN, scenes16)
    rows = main([model, "--data.root", str(scenes16), "--data.shards", shards])
    assert [chosen for chosen, _ in rows] == [(), ("position",), ("position", "class"), ("position", "class", "mask")]
    assert rows[0][1].quality.all.pq < 50 < 99 < rows[-1][1].quality.all.pq
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and "| position | class | mask | PQ " in lines[0] and " AP " in lines[0]
    assert all(evaluation.precision is not None for _, evaluation in rows)
    assert rows[0][1].precision.mean_ap < 1 < 99 < rows[-1][1].precision.mean_ap  # type: ignore[union-attr]
    coarse = stored(tmp_path, replace(SMALL_DEEPLAB, stuff_area=10**6), scenes16)
    options = ["--no-ap", "--swap", "none", "semantic+centre+offset+foreground", "--any-stuff-area"]
    rows = main([coarse, "--data.root", str(scenes16), "--data.shards", shards, *options])
    assert " AP " not in capsys.readouterr().out
    found = [evaluation.quality for _, evaluation in rows]
    assert len(found) == 3 and found[1].stuff.pq == 0 and found[2].all.pq > 99
    with pytest.raises(ValueError, match="offsets is none of semantic, centre, offset, foreground"):
        main([coarse, "--data.root", str(scenes16), "--data.shards", shards, "--swap", "offsets"])


def test_a_table_is_logged_and_stands_in_the_report_of_the_next_evaluation(
    small_categories: Categories, mlflow_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import evaluate
    from tests.support.stored import write_model, write_shards

    shards = write_shards(tmp_path / "val", small_categories, 3)
    model = write_model(tmp_path / "model", small_categories)
    places = [model, "--data.root", shards.uri, "--actors", "0"]
    evaluate.main([*places, "--out", "reports", "--examples", "1", "--quick"])
    (before,) = (tmp_path / "reports").glob("*.html")
    text = before.read_text()
    assert "<h2>Oracle</h2>" not in text and "Lost: " in text and "3 images of val, " in text
    main([*places, "--no-ap", "--swap", "none", "semantic+centre+offset+foreground"])
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "| x" in line]
    evaluate.main([*places, "--out", "reports", "--examples", "1", "--quick"])
    text = before.read_text()
    assert "<h2>Oracle</h2>" in text
    assert all(f"<td>{cell}</td>" in text for cell in cells[0]) and len(cells) == 1


def test_a_model_without_a_stuff_area_is_refused_before_anything_is_evaluated(
    monkeypatch: pytest.MonkeyPatch, scenes16: Path, tmp_path: Path
) -> None:
    model = stored(tmp_path, SMALL_DETR, scenes16)
    for place in ("pipelines.data.prepare.ensure_shards", "pipelines.evaluation.oracle.oracle"):
        monkeypatch.setattr(place, lambda *given, **options: pytest.fail("data were read"))
    with pytest.raises(ValueError, match="DETRConfig has no stuff_area"):
        main([model, "--data.root", str(scenes16), "--any-stuff-area", "--no-log"])
