"""Files round trip; whatever does not fit is refused by name."""

from __future__ import annotations

import io
import pickle
import time
import zipfile
from dataclasses import replace

import pytest
import torch

from panoptic import models
from panoptic.segmentation import Categories
from panoptic.training import checkpoint
from panoptic.training.optim import Optim, build_ema, build_optimiser, update_ema
from panoptic.training.plain import read_config, to_plain
from tests.support.tiny import TinyBackbone, TinyConfig, tiny_batch, tiny_categories

CONFIG = TinyConfig(TinyBackbone(width=6, norm="group"), rates=(3, 6, 9), factor=0.5)


@pytest.fixture(autouse=True)
def tiny_architecture(monkeypatch):
    monkeypatch.setattr(models, "Architecture", TinyConfig, raising=False)


def saved(classes: int = 3, **values) -> dict:
    model = CONFIG.build(tiny_categories(classes))
    file = io.BytesIO()
    checkpoint.save(file, config=CONFIG, model=model, **values)
    file.seek(0)
    return checkpoint.load(file)


def saved_by_nobody() -> dict:
    """The entries of a checkpoint that no model wrote."""
    return {"categories": tiny_categories().to_coco(), "weights": {}, "ema": None}


def test_round_trip_builds_the_same_model():
    model = CONFIG.build(tiny_categories())
    optimiser = build_optimiser(model, Optim())
    ema = build_ema(model, 0.9)
    file = io.BytesIO()
    experiment = {"optim.lr": 0.1, "optim.betas": (0.9, 0.99), "data.root": "x"}
    checkpoint.save(
        file,
        config=CONFIG,
        model=model,
        ema=ema,
        optimiser=optimiser,
        step=7,
        position=56,
        run_id="abc",
        experiment=experiment,
    )
    file.seek(0)
    record = checkpoint.load(file)
    assert (record["step"], record["position"], record["run_id"]) == (7, 56, "abc")
    assert record["experiment"] == {"optim.lr": 0.1, "optim.betas": [0.9, 0.99], "data.root": "x"}
    assert read_config(record["config"]) == CONFIG
    built = checkpoint.build_model(record)
    assert built.categories == model.categories and not built.training
    images, _ = tiny_batch(0)
    torch.testing.assert_close(built.network(images), model.network(images))


def test_build_prefers_the_averaged_weights():
    model = CONFIG.build(tiny_categories())
    ema = build_ema(model, 0.5)
    update_ema(ema, model, 0.5)
    torch.nn.init.zeros_(model.head.weight)
    file = io.BytesIO()
    checkpoint.save(file, config=CONFIG, model=model, ema=ema)
    file.seek(0)
    record = checkpoint.load(file)
    assert checkpoint.build_model(record).head.weight.abs().sum() > 0
    assert checkpoint.build_model(record, ema=False).head.weight.abs().sum() == 0
    other = CONFIG.build(tiny_categories())
    average = build_ema(other, 0.5)
    checkpoint.restore(record, other, ema=average)
    assert other.head.weight.abs().sum() == 0
    torch.testing.assert_close(average.module.head.weight, ema.module.head.weight)


def test_files_that_are_no_checkpoint_are_refused():
    def load(record: object) -> None:
        file = io.BytesIO()
        torch.save(record, file)
        file.seek(0)
        checkpoint.load(file, "some.pt")

    with pytest.raises(ValueError, match=r"some\.pt: not a checkpoint"):
        checkpoint.load(io.BytesIO(b"no zip"), "some.pt")
    with pytest.raises(ValueError, match=r"jobs/convert\.py"):
        load({"model": torch.ones(2)})
    with pytest.raises(ValueError, match="format 99"):
        load({"format": 99})
    with pytest.raises(ValueError, match="lacks config"):
        load({"format": checkpoint.FORMAT})


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was executed",))


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_executed(legacy):
    file = io.BytesIO()
    if legacy:
        pickle.dump({"format": Trap()}, file, protocol=2)
    else:
        torch.save({"format": Trap()}, file)
    file.seek(0)
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load(file)


@pytest.mark.parametrize("count", [1001, 10**6, 10**15])
@pytest.mark.parametrize("option", ["decoder_layers", "encoder_layers"])
def test_a_model_is_not_built_without_end(option, count, monkeypatch):
    """Layers without weights take no memory of tensors, but a module each, before a shape is compared."""
    from tests.support.small import SMALL_MASK2FORMER

    monkeypatch.setattr(models, "Architecture", type(SMALL_MASK2FORMER))
    record = saved_by_nobody()
    record["config"] = to_plain(SMALL_MASK2FORMER) | {option: count}
    begin = time.monotonic()
    with pytest.raises(ValueError, match=rf"{option}: {count}, but it must be at most 1000; the file makes no model"):
        checkpoint.build_model(record)
    assert time.monotonic() - begin < 5


def test_keys_that_do_not_fit_are_named():
    record = saved()
    weights = record["weights"]
    weights["stray"] = torch.ones(1)
    weights["head.weight"] = torch.ones(2, 6, 1, 1)
    del weights["head.bias"]
    with pytest.raises(ValueError) as error:
        checkpoint.build_model(record)
    text = str(error.value)
    assert "missing: head.bias" in text
    assert "unexpected: stray" in text
    assert "another shape: head.weight (file [2, 6, 1, 1], model [3, 6, 1, 1])" in text


def test_other_categories_are_named():
    model = CONFIG.build(tiny_categories(4))
    with pytest.raises(ValueError, match=r"3 classes are not the 4.*only in the data: class 3 \(thing\)"):
        checkpoint.restore(saved(), model)
    swapped = Categories.from_coco([tiny_categories().to_coco()[i] for i in (0, 2, 1)])
    with pytest.raises(ValueError, match=r"the order differs: class 2 \(stuff\) / class 1 \(thing\)"):
        checkpoint.check_categories(swapped, tiny_categories())
    renumbered = replace(tiny_categories(), ids=(5, 6, 7))
    checkpoint.check_categories(renumbered, tiny_categories())


def test_continuing_needs_an_optimiser_state():
    model = CONFIG.build(tiny_categories())
    with pytest.raises(ValueError, match="no optimiser state"):
        checkpoint.restore(saved(), model, build_optimiser(model, Optim()))


def refusal(data: bytes | dict) -> str:
    """What `load` says about a file, in one line; a dict is saved first."""
    file = io.BytesIO(data if isinstance(data, bytes) else b"")
    if isinstance(data, dict):
        torch.save(data, file)
        file.seek(0)
    with pytest.raises(ValueError) as error:
        checkpoint.load(file, "some.pt")
    text = str(error.value)
    assert text.startswith("some.pt: ") and "\n" not in text and len(text) < 600
    return text


def whole() -> bytes:
    file = io.BytesIO()
    model = CONFIG.build(tiny_categories())
    checkpoint.save(file, config=CONFIG, model=model, optimiser=build_optimiser(model, Optim()))
    return file.getvalue()


def test_files_of_something_else_are_refused_in_one_line():
    data = whole()
    assert "the file is empty" in refusal(b"")
    for other in (b"step 3\n", b"\0" * 5000, bytes(range(256)) * 40, data[: len(data) // 2], data[100:], b"PK\x05\x06"):
        assert "not a checkpoint of panoptic-ray, or cut short" in refusal(other)
    for place in range(200, 1800, 97):  # within the pickle: some make another checkpoint, none a traceback
        changed = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        try:
            checkpoint.load(io.BytesIO(changed), "some.pt")
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_file_on_disk_is_checked_alike(tmp_path):
    (tmp_path / "a.pt").write_bytes(whole())
    assert checkpoint.load(str(tmp_path / "a.pt"))["step"] == 0
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        checkpoint.load(str(tmp_path / "a.pt"))
    with pytest.raises(FileNotFoundError):
        checkpoint.load(str(tmp_path / "none.pt"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": None}, "weights is no state dict"),
        ({"weights": {}}, "weights is no state dict"),
        ({"weights": {"a": 1.0}}, "weights is no state dict"),
        ({"weights": {1: torch.ones(1)}}, "weights is no state dict"),
        ({"ema": [], "step": "3"}, "ema is no state dict, or None; step is no number of steps"),
        ({"step": True}, "step is no number"),
        ({"position": -1}, "position is no position"),
        ({"position": 1 << 70}, "position is no position"),
        ({"ema_updates": None}, "ema_updates is no number"),
        ({"run_id": None}, "run_id is no text"),
        ({"experiment": [1]}, "experiment is no flat configuration"),
        ({"config": {"classes": 3}}, "config is no configuration"),
        ({"optimiser": {"state": {}}}, "optimiser is no optimiser's state"),
        ({"categories": []}, "categories is no list"),
        ({"categories": [{"id": 1, "name": "a", "isthing": "0", "color": [1, 2, 3]}]}, r"categories[0] is no COCO"),
        ({"categories": [{"id": 1, "name": "a", "isthing": 0, "color": [1, 2]}]}, r"categories[0] is no COCO"),
        ({"weights": {"a": torch.zeros(1).expand(1 << 20, 1 << 20)}}, "a tensor is larger than its place"),
        ({"weights": {"a": torch.eye(3).to_sparse()}}, "or sparse"),
        ({"optimiser": {"state": {0: torch.zeros(1).expand(1 << 40)}, "param_groups": []}}, "a tensor is larger"),
    ],
)
def test_entries_of_another_kind_are_named(changes, words):
    assert words in refusal({**saved(), **changes})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["weights", "ema"])
def test_weights_that_are_not_finite_are_named(part, value):
    record = saved()
    record["ema"] = {key: tensor.clone() for key, tensor in record["weights"].items()}
    record[part]["head.bias"][1] = value
    text = refusal(record)
    assert "1 of" in text and "not finite (NaN or infinite): head.bias" in text and "earlier checkpoint" in text


def test_a_compressed_archive_is_not_unpacked():
    """64 MiB of zeros in 64 kB, where torch would allocate all of them."""
    data, packed = io.BytesIO(), io.BytesIO()
    torch.save({**saved(), "weights": {"a": torch.zeros(1 << 24)}}, data)
    with zipfile.ZipFile(data) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in source.infolist():
            archive.writestr(entry.filename, source.read(entry))
    assert len(packed.getvalue()) < 1 << 18
    assert "compressed or overlap" in refusal(packed.getvalue())


def test_a_record_that_holds_itself_is_read_once():
    record = saved()
    record["experiment"]["self"] = loop = []
    loop.append(loop)
    file = io.BytesIO()
    torch.save(record, file)
    file.seek(0)
    assert checkpoint.load(file)["step"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"backbone.width": -5}}, "makes no model"),
        ({"config": {"backbone.width": 10**15}}, "does not fit Tiny; another shape"),
        ({"config": {"backbone.width": 2**63}}, "makes no model"),
        ({"config": {"rates": "x"}}, "makes no model"),
        ({"config": {"depth": 3}}, "unknown field depth"),
        ({"config": {"class": "os.system"}}, "architecture 'os.system' is not known"),
        (
            {"weights": {"head.bias": torch.ones(3, dtype=torch.int64)}},
            "another kind of numbers: head.bias (file torch.i",
        ),
        ({"weights": {"head.bias": torch.ones(3, dtype=torch.complex64)}}, "another kind of numbers: head.bias"),
        ({"weights": {"head.more": torch.ones(3)}}, "unexpected: head.more"),
        ({"categories": "twice"}, "the id 1 of categories appears more than once; "),
    ],
)
def test_what_makes_no_model_is_told_with_the_file_in_one_line(changes, words):
    """Sizes that were changed took memory, or ended in torch's own text; numbers of another kind were cut."""
    record = saved()
    for path, value in changes.get("config", {}).items():
        *above, name = path.split(".")
        node = record["config"]
        for part in above:
            node = node[part]
        node[name] = value
    record["weights"] = {**record["weights"], **changes.get("weights", {})}
    if "categories" in changes:
        record["categories"] = record["categories"][:1] * 2
    with pytest.raises(ValueError, match=r"^folder/x\.pt: ") as refused:
        checkpoint.build_model(record, name="folder/x.pt")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_weights_of_half_precision_are_taken():
    record = saved()
    record["weights"] = {
        key: value.half() if value.is_floating_point() else value for key, value in record["weights"].items()
    }
    assert checkpoint.build_model(record).head.bias.dtype == torch.float32
