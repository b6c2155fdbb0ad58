"""Swin against torchvision's, at its borders, and the files of three projects."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from panoptic.backbones import Backbone
from panoptic.backbones.swin import Swin, shift_mask
from panoptic.backbones.weights import load_weights


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [(120, 168), (250, 230)])
def test_swin_equals_torchvision(size: tuple[int, int]) -> None:
    """Where padded maps exceed a window: torchvision does not shift within a single one. 250x230 pads every map."""
    theirs = torchvision.models.swin_t(weights=None).eval()
    ours = Swin("swin_tiny").eval()
    state = torchvision_swin(theirs, ours)
    ours.load_state_dict(state)
    x = images(1, 3, -(-size[0] // 4) * 4, -(-size[1] // 4) * 4)
    stages = (1, 3, 5, 7) if min(size) > 224 else (1, 3, 5)
    with torch.no_grad():
        features = list(ours(x).values())
        y = x
        for index, layer in enumerate(theirs.features):
            y = layer(y)
            if index in stages:
                expected = nn.functional.layer_norm(y, y.shape[-1:]).permute(0, 3, 1, 2)
                torch.testing.assert_close(features[index // 2], expected, rtol=1e-4, atol=1e-4)


def torchvision_swin(theirs: nn.Module, ours: nn.Module) -> dict[str, Tensor]:
    """torchvision's weights under the original's names."""
    state = ours.state_dict()
    modules = {
        "patch_embed.proj": theirs.features[0][0],
        "patch_embed.norm": theirs.features[0][2],
    }
    for stage in range(4):
        for b, block in enumerate(theirs.features[2 * stage + 1]):
            parts = {"norm1": block.norm1, "norm2": block.norm2, "attn.qkv": block.attn.qkv}
            parts |= {"attn.proj": block.attn.proj, "mlp.fc1": block.mlp[0], "mlp.fc2": block.mlp[3]}
            modules |= {f"layers.{stage}.blocks.{b}.{name}": part for name, part in parts.items()}
            table = block.attn.relative_position_bias_table
            state[f"layers.{stage}.blocks.{b}.attn.relative_position_bias_table"] = table.detach()
        if stage < 3:
            merging = theirs.features[2 * stage + 2]
            modules |= {f"layers.{stage}.downsample.{n}": getattr(merging, n) for n in ("norm", "reduction")}
    return state | {f"{name}.{k}": v.detach() for name, part in modules.items() for k, v in part.state_dict().items()}


def test_a_map_smaller_than_a_window_is_padded_and_shifted() -> None:
    """As the original: five tokens in a window of seven, shifted by three. Each attends within its region only."""
    block = Swin("swin_tiny").layers[0].blocks[1].eval()
    mask = shift_mask(7, 7, 7, 3, torch.device("cpu"))
    x = images(1, 5, 5, 96)
    with torch.no_grad():
        before = block(x, mask)
        moved = x.clone()
        moved[0, 0, 0] += 1.0  # in the last region after the shift: rows and columns 0 to 2
        after = block(moved, mask)
    changed = (before != after).any(-1)[0]
    assert changed[:3, :3].all() and not changed[3:].any() and not changed[:, 3:].any()


def test_swin_files_of_three_projects_load() -> None:
    source = Swin("swin_tiny")
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    state = {k: v for k, v in source.state_dict().items() if not k.startswith(tuple(f"norm{i}" for i in range(4)))}
    published = {**state, "norm.weight": torch.ones(768), "head.bias": torch.zeros(1000)}
    published |= {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    published |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    late = {
        k.replace(f"layers.{k.split('.')[1]}.", f"layers.{int(k.split('.')[1]) + 1}.") if ".downsample." in k else k: v
        for k, v in state.items()
    }
    for form in (published, late):
        target = Swin("swin_tiny")
        assert load_weights(target, form) == sorted(f"norm{i}.{w}" for i in range(4) for w in ("bias", "weight"))
        assert all(torch.equal(target.state_dict()[k], v) for k, v in state.items())
    complete = {f"backbone.{k}": v for k, v in source.state_dict().items()}
    assert load_weights(Swin("swin_tiny"), complete) == []
    with pytest.raises(ValueError, match=r"layers.0.blocks.0.attn.relative_position_bias_table \(169, 3\) instead"):
        load_weights(Swin("swin_base"), published)


def test_swin_skips_blocks_in_training_only() -> None:
    backbone = Backbone("swin_tiny", drop_path=0.5, freeze=4).build()
    rates = [block.drop_path for stage in backbone.layers for block in stage.blocks]
    assert rates[:10] == [0.0] * 10 and rates[-1] == 0.5
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        torch.manual_seed(0)
        trained = [backbone.train()(x) for _ in range(4)]
        evaluated = [backbone.eval()(x) for _ in range(2)]
    assert torch.equal(evaluated[0]["res5"], evaluated[1]["res5"])
    assert torch.equal(trained[0]["res4"], evaluated[0]["res4"])
    assert any(not torch.equal(y["res5"], evaluated[0]["res5"]) for y in trained)
