"""Our ResNet against torchvision's where they overlap, and the variants that only ours has."""

from __future__ import annotations

import pytest
import torch
import torchvision

from panoptic.backbones.resnet import ResNet


def fill(module: torch.nn.Module) -> None:
    """Weights and statistics that differ from layer to layer."""
    generator = torch.Generator().manual_seed(1)
    for name, value in module.state_dict().items():
        if value.dtype == torch.float32:
            noise = torch.rand(value.shape, generator=generator)
            value.copy_(0.5 + noise if value.dim() == 1 else (noise - 0.5) * (3 / value[0].numel()) ** 0.5)
        assert name


@pytest.mark.parametrize(
    ("name", "stride"),
    [("resnet18", 32), ("resnet34", 32), ("resnet50", 32), ("resnet50", 16), ("resnet50", 8), ("resnet101", 32)],
)
def test_equals_torchvision(name: str, stride: int) -> None:
    options = {16: [False, False, True], 8: [False, True, True], 32: None}[stride]
    extra = {} if options is None else {"replace_stride_with_dilation": options}
    theirs = torchvision.models.get_model(name, weights=None, **extra).eval()
    ours = ResNet(name, output_stride=stride).eval()
    fill(theirs)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.rand(1, 3, 65, 97, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = ours(x)
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for stage, layer in zip(features, [torch.nn.Identity(), *list(theirs.children())[4:8]], strict=True):
            y = layer(y)
            assert torch.equal(features[stage], y), stage
            assert features[stage].shape[1] == ours.channels[stage]
            assert features[stage].shape[2] == -(-65 // ours.strides[stage])


def test_deeplab_backbone_has_the_published_dilations() -> None:
    backbone = ResNet("resnet50", deeplab_stem=True, output_stride=16, dilate_first=True, multigrid=(1, 2, 4))
    assert [block.conv2.dilation for block in backbone.layer4] == [(2, 2), (4, 4), (8, 8)]
    assert [block.conv2.dilation for block in backbone.layer3] == [(1, 1)] * 6
    assert backbone.strides == {"stem": 4, "res2": 4, "res3": 8, "res4": 16, "res5": 16}
    assert backbone.channels["stem"] == 128
    assert backbone.layer1[0].conv1.weight.shape == (64, 128, 1, 1)
    assert backbone(torch.zeros(1, 3, 64, 64))["res5"].shape == (1, 2048, 4, 4)


@pytest.mark.parametrize("in_1x1", [False, True])
def test_where_a_bottleneck_strides(in_1x1: bool) -> None:
    backbone = ResNet("resnet50", stride_in_1x1=in_1x1)
    for layer in (backbone.layer2, backbone.layer3, backbone.layer4):
        assert layer[0].conv1.stride == ((2, 2) if in_1x1 else (1, 1))
        assert layer[0].conv2.stride == ((1, 1) if in_1x1 else (2, 2))
        assert all(block.conv1.stride == block.conv2.stride == (1, 1) for block in layer[1:])


def test_trains_with_every_norm_and_keeps_statistics_finite() -> None:
    for norm in ("batch", "group", "frozen"):
        backbone = ResNet("resnet18", norm).train()
        sum(f.mean() for f in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in backbone.parameters())
