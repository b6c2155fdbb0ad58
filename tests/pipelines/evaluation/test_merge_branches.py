"""Two models trained apart become one that says what each of them says, and the table of both kinds of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from panoptic.models.jsis_net.model import JSISNet, JSISNetConfig
from panoptic.models.jsis_net.postprocess import Conflicts
from panoptic.segmentation import Categories, Frame
from panoptic.transforms import Resize
from pipelines.evaluation.evaluate import Stored, load
from pipelines.evaluation.merge_branches import merge, save, table
from tests.support.small import SMALL, SMALL_DEEPLAB, SMALL_JSIS
from tests.support.stored import write_shards

OPTIONS: dict[str, Any] = {"resize.short": 64, "engine.precision": "float32", "optim.lr": 0.1}


def stored(config: Any, categories: Categories, seed: int, **options: Any) -> Stored:
    torch.manual_seed(seed)
    model = config.build(categories)
    for buffer in model.buffers():  # statistics that differ, too
        if buffer.is_floating_point() and buffer.ndim == 1:
            buffer.uniform_(0.5, 1.5)
    return Stored(model.eval(), {**OPTIONS, **options})


@pytest.mark.parametrize("name", ["own_stage", "last_stage", "crop"])
@pytest.mark.parametrize("kinds", [("semantic", "instances"), ("both", "both")])
def test_the_merged_model_says_what_the_two_say(name: str, kinds: tuple[str, str], small_categories) -> None:
    config = SMALL[JSISNetConfig][name]
    semantic, instances = (
        stored(replace(config, branches=kind), small_categories, k)
        for k, kind in enumerate(kinds)  # type: ignore[arg-type]
    )
    merged = merge(semantic, instances).model
    assert isinstance(merged, JSISNet) and merged.config.trunks == "separate" and not merged.training
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        one, two, both = (model.network(images) for model in (semantic.model, instances.model, merged))
    assert torch.equal(both["semantic"], one["semantic"])
    assert all(torch.equal(both[key], two[key]) for key in ("features", "objectness", "deltas"))
    frame = Frame.full(images)
    expected = instances.model.postprocess({**two, "semantic": one["semantic"]}, frame).maps
    for a, b in zip(merged.postprocess(both, frame).maps, expected, strict=True):
        assert np.array_equal(a.segments, b.segments) and np.array_equal(a.labels, b.labels)


def test_it_is_a_checkpoint_like_any_other(small_categories, tmp_path: Path) -> None:
    merged = merge(
        stored(replace(SMALL_JSIS, branches="semantic"), small_categories, 1),
        stored(replace(SMALL_JSIS, branches="instances"), small_categories, 2),
    )
    file = save(merged, str(tmp_path / "merged"))
    assert file.endswith("merged/checkpoint.pt")
    again = load(str(tmp_path / "merged"))
    assert again.options == OPTIONS
    for name, value in merged.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_models_that_do_not_belong_together_are_refused(small_categories) -> None:
    semantic = stored(replace(SMALL_JSIS, branches="semantic"), small_categories, 1)
    instances = stored(replace(SMALL_JSIS, branches="instances"), small_categories, 2)
    with pytest.raises(ValueError, match="semantic model has branches instances"):
        merge(instances, instances)
    with pytest.raises(ValueError, match="the instances model is a PanopticDeepLab"):
        merge(semantic, stored(SMALL_DEEPLAB, small_categories, 3))
    other = stored(replace(SMALL_JSIS, branches="instances", conflicts=Conflicts(stuff_area=7)), small_categories, 2)
    with pytest.raises(ValueError, match=r"differ in model\.conflicts; train both"):
        merge(semantic, other)
    smaller = stored(replace(SMALL_JSIS, branches="instances"), small_categories, 2, **{"resize.short": 32})
    with pytest.raises(ValueError, match=r"differ in resize\.short"):
        merge(semantic, smaller)
    classes = Categories(("a", "b"), (True, False), (1, 2), ((0, 0, 0),) * 2)
    with pytest.raises(ValueError, match="the semantic model: its 5 classes"):
        merge(semantic, stored(replace(SMALL_JSIS, branches="instances"), classes, 2))


def test_one_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], small_categories) -> None:
    from jobs import independent
    from panoptic.training.checkpoint import save as save_checkpoint
    from pipelines.config import flatten
    from pipelines.presets import PRESETS

    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", small_categories, 8)
    experiment = replace(PRESETS["jsis-net-scenes"](), resize=Resize(short=64))
    folders = []
    for branches in ("both", "semantic", "instances"):
        torch.manual_seed(0)
        config = replace(SMALL_JSIS, branches=branches)  # type: ignore[arg-type]
        folder = tmp_path / branches
        folder.mkdir()
        save_checkpoint(
            str(folder / "checkpoint.pt"),
            config=config,
            model=config.build(small_categories),
            experiment=flatten(replace(experiment, model=config)),
        )
        folders.append(str(folder))
    places = ["--data.root", shards.uri, "--out", str(tmp_path / "merged.pt"), "--actors", "0"]
    found = independent.main([*folders, *places])
    lines = capsys.readouterr().out.splitlines()
    assert found["joint"].precision is not None and found["merged"].images == 8
    assert (tmp_path / "merged.pt").exists()
    assert [line.split()[0] for line in lines[-4:]] == ["mIoU", "joint", "semantic", "instances"]
    assert lines[-2].split()[-3:][1] == "-" and lines[-1].split()[-3:][0] == "-"
    assert lines[-3:] == table(found["joint"], found["merged"]).splitlines()[1:]
