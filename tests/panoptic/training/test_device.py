"""A model and its batches on their device, the precision of the network, and seeds."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from panoptic.layers import precision as half
from panoptic.training.device import Engine, autocast, precision_note, prepare, seed_torch, set_tf32, to_device, unwrap
from tests.support.tiny import TinyConfig, tiny_batch, tiny_categories


@pytest.mark.parametrize("channels_last", [False, True])
def test_model_and_batch_have_one_memory_format(channels_last: bool) -> None:
    engine = Engine(channels_last=channels_last)
    model = prepare(TinyConfig().build(tiny_categories()), "cpu", engine)
    images, targets = to_device(model, *tiny_batch(0), engine)
    for tensor in (model.backbone[0].weight, images):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert targets.segments.device == images.device


def test_the_model_is_found_inside_its_wrappers() -> None:
    model = TinyConfig().build(tiny_categories())
    assert unwrap(model) is model
    assert unwrap(torch.compile(model)) is model


@pytest.mark.parametrize(("precision", "kind"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
@pytest.mark.usefixtures("half_precision")
def test_the_network_runs_in_the_precision_of_the_engine(precision, kind: torch.dtype) -> None:
    x = torch.ones(2, 2)
    with autocast(x, Engine(precision=precision)):
        assert (x @ x).dtype == kind


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("known", [{"avx512_bf16": True, "avx512_fp16": True}, {"avx2": True, "avx512_bf16": False}])
def test_a_cpu_without_instructions_for_half_precision_computes_in_float32_and_says_so(
    precision, known: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    half.multiplies.cache_clear()
    try:
        model, engine, x = Depthwise(), Engine(precision=precision), torch.ones(2, 2)
        prepare(model, "cpu", engine)  # type: ignore[arg-type]
        with autocast(x, engine):
            kind = (x @ x).dtype
        note = precision_note(torch.device("cpu"), engine)
    finally:
        half.multiplies.cache_clear()
    if known.get("avx2"):
        assert kind == torch.float32 and type(model.conv) is nn.Conv2d
        assert note == f"engine.precision {precision}: this CPU has no instructions for it, so it computes in float32"
    else:
        assert kind == getattr(torch, precision) and not note
        assert (type(model.conv) is nn.Conv2d) == (precision == "float16")


class Depthwise(nn.Module):
    """One convolution that stays in float32 where the others are bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 5, groups=4)


def test_every_micro_batch_of_every_worker_draws_its_own_numbers_again() -> None:
    def draw(*place: int) -> float:
        seed_torch(*place)
        return float(torch.rand(()))

    places = list(itertools.product(range(2), repeat=4))
    drawn = [draw(*place) for place in places]
    assert len(set(drawn)) == len(places)
    assert drawn == [draw(*place) for place in places]


def test_a_seed_draws_what_torchs_own_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, and each GPU where there are any."""
    told: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", told.append)
    seed_torch(3, 1, 4, 1)
    drawn = torch.rand(5)
    assert len(told) == 1 and told[0] == torch.initial_seed()
    torch.manual_seed(told[0])
    assert torch.equal(torch.rand(5), drawn)


@pytest.mark.parametrize(
    ("tf32", "flags"), [("none", (False, False)), ("convolutions", (False, True)), ("all", (True, True))]
)
def test_what_is_computed_in_tf32_is_set_for_the_whole_process(tf32, flags: tuple[bool, bool]) -> None:
    """The other way round before, and as it was afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = (not flag for flag in flags)
        set_tf32(Engine(tf32=tf32))
        assert (matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == flags
    finally:
        matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    assert (matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before
