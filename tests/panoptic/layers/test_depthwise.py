"""Depthwise convolutions that stay in float32 on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from panoptic.layers.depthwise import keep_depthwise_in_float32
from panoptic.models.panoptic_deeplab.model import PanopticDeepLabConfig
from panoptic.segmentation import Categories
from panoptic.training.device import Engine, prepare


def conv(kernel: int = 5, stride: int = 1, groups: int = 8, dilation: int = 1, channels: int = 8) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, channels, kernel, stride, dilation * (kernel // 2), dilation, groups)


def changed(module: nn.Conv2d) -> bool:
    keep_depthwise_in_float32(module)
    return type(module) is not nn.Conv2d


@pytest.mark.parametrize(
    ("module", "slow_or_wrong"),
    [
        (conv(kernel=5), True),
        (conv(kernel=3, stride=2), True),
        (conv(kernel=3), False),
        (conv(kernel=5, groups=1), False),
        (conv(kernel=5, groups=2), False),
        (nn.Conv2d(1, 8, 5), False),  # of one channel, but dense
        (conv(kernel=3, dilation=2), True),
        (conv(kernel=3, dilation=2, groups=2), True),
        (conv(kernel=3, dilation=2, groups=1), False),
    ],
)
def test_which_ones_are_slow_or_wrong_in_bfloat16(module: nn.Conv2d, slow_or_wrong: bool):
    assert changed(module) is slow_or_wrong


@pytest.mark.parametrize("groups", [240, 30])
def test_gradients_of_a_dilation_are_those_of_the_images_and_not_of_old_memory(groups: int):
    module = conv(kernel=3, dilation=2, groups=groups, channels=240).to(memory_format=torch.channels_last)
    images = torch.randn(4, 240, 24, 40).to(memory_format=torch.channels_last)
    module(images).square().mean().backward()
    assert module.weight.grad is not None
    truth = module.weight.grad.clone()
    keep_depthwise_in_float32(module)
    for _ in range(8):
        for count in (1_000, 20_000, 200_000):
            torch.full((count,), 1e30)  # what lies in memory afterwards
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = module(images)
        output.float().square().mean().backward()
        assert module.weight.grad is not None
        torch.testing.assert_close(module.weight.grad, truth, rtol=0.02, atol=0.02 * float(truth.abs().max()))


def test_under_autocast_it_is_float32s_result_in_the_type_of_autocast():
    plain, kept = conv(), conv()
    keep_depthwise_in_float32(kept)
    keep_depthwise_in_float32(kept)  # once is enough, twice is the same
    x = torch.randn(2, 8, 6, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, rounded, stored = kept(x), plain(x), kept(x.float())
    truth = plain(x.float())
    assert found.dtype == stored.dtype == torch.bfloat16
    assert torch.equal(found, truth.bfloat16()) and torch.equal(stored, found)
    assert not torch.equal(rounded, found)  # its weights were rounded
    found.float().square().sum().backward()
    assert kept.weight.grad is not None and kept.weight.grad.dtype == torch.float32
    assert torch.equal(kept(x.float()), truth)  # without autocast nothing changes


def test_names_weights_and_copies_stay():
    plain, kept = nn.Sequential(conv()), nn.Sequential(conv())
    keep_depthwise_in_float32(kept)
    again = copy.deepcopy(kept)
    assert list(kept.state_dict()) == list(plain.state_dict()) and repr(kept) == repr(plain)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(1, 8, 5, 5)
    assert torch.equal(again(x), plain(x)) and type(again[0]) is type(kept[0])


def test_the_padding_of_tensorflow_is_kept():
    same = pytest.importorskip("timm.layers").Conv2dSame(8, 8, 5, stride=2, groups=8)
    x = torch.randn(1, 8, 7, 10)
    truth = same(x)
    assert changed(same) and torch.equal(same(x), truth) and truth.shape[-2:] == (4, 5)


@pytest.mark.parametrize(("precision", "kept"), [("bfloat16", True), ("float32", False)])
@pytest.mark.usefixtures("half_precision")
def test_a_model_that_is_prepared_for_bfloat16_on_a_cpu_has_them(precision: str, kept: bool):
    categories = Categories(("person", "road"), (True, False), (1, 2), ((1, 2, 3), (4, 5, 6)))
    model = PanopticDeepLabConfig(flavour="detectron2", aspp_separable=True, kernel=5).build(categories)
    before = {name: type(module) for name, module in model.named_modules()}
    prepare(model, "cpu", Engine(precision=precision))  # type: ignore[arg-type]
    others = {name for name, module in model.named_modules() if type(module) is not before[name]}
    assert bool(others) is kept and all(before[name] is nn.Conv2d for name in others)
