"""The conversion job on a published file: its checkpoint builds the model again."""

from __future__ import annotations

import ast
import json
import pickle
import re

import numpy as np
import pytest
import torch

from jobs.convert import main
from panoptic.training.checkpoint import build_model, load
from pipelines.cluster import progress

NAME = "panoptic_deeplab_B_r52_dsconv_cityscapes"


@pytest.fixture
def published(shared, tmp_path) -> list[str]:
    """The arguments for a detectron2 pickle with the weights of one rule, and its categories."""
    rng = np.random.default_rng(0)
    state = {}
    for line in shared(f"specs/keys/{NAME}.txt").read_text().splitlines():
        key, shape = line.split("\t")[:2]
        state[key] = rng.random(ast.literal_eval(shape), np.float32)
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": state, "__author__": "somebody"}))
    categories = [{"id": i + 7, "name": f"class {i}", "isthing": int(i >= 11)} for i in range(19)]
    (tmp_path / "categories.json").write_text(json.dumps({"categories": categories}))
    files = [str(tmp_path / name) for name in ("model.pkl", "categories.json", "model.pt")]
    return [files[0], "--source", "detectron2", "--categories", files[1], "--out", files[2]]


def test_a_published_file_becomes_a_checkpoint(published, capsys) -> None:
    config = main([*published, "--set", "image_pool=[64, 64]", "--set", "backbone.freeze=2"])
    assert config.image_pool == (64, 64) and config.backbone.freeze == 2
    assert "544 weights" in capsys.readouterr().out
    model = build_model(load(published[-1]))
    assert len(model.categories) == 19 and model.categories.ids[0] == 7
    with open(published[0], "rb") as file:
        weight = pickle.load(file)["model"]["sem_seg_head.predictor.weight"]
    assert torch.equal(model.semantic_head.predictor.weight.detach(), torch.from_numpy(weight))


def test_reading_shows_how_far_it_is(published, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []

    class Counted(progress.Progress):
        def advance(self, count: int, before: bool = False, **counts: int) -> None:
            super().advance(count, before, **counts)
            lines.append(self.line())

    monkeypatch.setattr(progress, "Progress", Counted)
    main(published)
    assert len(lines) > 10
    assert re.search(r"^read 1 of [\d,]+ MiB \(\d+\.\d%\), [\d.]+ MiB/s, \d\d:\d\d left$", lines[0])
    assert "(100.0%)" in lines[-1] and lines[-1].endswith("00:00 left")


@pytest.mark.parametrize(
    ("change", "message"),
    [("stuf_area=1", "no field stuf_area"), ("stuff_area=much", "stuff_area"), ("backbone.x.y=1", "no field")],
)
def test_a_mistyped_field_is_named(published, change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([*published, "--set", change])


def test_differences_need_the_file_that_they_differ_from(tmp_path, capsys) -> None:
    from tests.panoptic.backbones.test_vit_names import hugging_face_dinov3
    from tests.panoptic.convert.test_eomt import drawn, original_names, vit_of

    whole, base = drawn(), vit_of(drawn(1))
    inside = "backbone.body."
    file = {k: v - base[k.removeprefix(inside)] if k.startswith(inside) else v for k, v in whole.items()}
    torch.save({"state_dict": original_names(file)}, tmp_path / "eomt.ckpt")
    torch.save(hugging_face_dinov3(base), tmp_path / "dinov3.pt")
    (tmp_path / "categories.json").write_text(json.dumps([{"id": i, "name": f"c{i}", "isthing": 1} for i in range(5)]))
    paths = {name: str(tmp_path / name) for name in ("eomt.ckpt", "dinov3.pt", "categories.json", "model.pt")}
    arguments = [paths["eomt.ckpt"], "--source", "eomt", "--categories", paths["categories.json"]]
    arguments += ["--out", paths["model.pt"], "--heads", "4", "--canvas", "64", "64"]
    with pytest.raises(ValueError, match=r"--base FILE"):
        main(arguments)
    main([*arguments, "--base", paths["dinov3.pt"]])
    assert re.search(r"canvas +\[64, 64\]", capsys.readouterr().out)
    for key, value in build_model(load(paths["model.pt"])).state_dict().items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=1e-5)
    (tmp_path / "text.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt: refused"):
        main([*arguments, "--base", str(tmp_path / "text.pt")])
