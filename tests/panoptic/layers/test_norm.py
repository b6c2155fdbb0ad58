"""Normalisation layers, frozen ones, and freezing."""

from __future__ import annotations

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from panoptic.layers.norm import FrozenBatchNorm, freeze, norm_layer, set_norm_momentum, synchronise_norms


def test_norms() -> None:
    x = torch.rand(2, 48, 5, 5)
    group = norm_layer("group", 48)
    assert isinstance(group, nn.GroupNorm) and group.num_groups == 16
    assert isinstance(norm_layer("sync", 8), nn.SyncBatchNorm)
    frozen = norm_layer("frozen", 48)
    torch.testing.assert_close(frozen(x), x)
    assert not list(frozen.parameters())
    with pytest.raises(ValueError, match="not one of"):
        norm_layer("layer", 8)  # type: ignore[arg-type]
    for norm in ("batch", "group", "sync", "frozen"):
        assert {"weight", "bias"} <= norm_layer(norm, 8).state_dict().keys()
    assert norm_layer("batch", 8).state_dict().keys() == norm_layer("frozen", 8).state_dict().keys()


def test_frozen_norm_takes_half_precision_and_passes_gradients() -> None:
    frozen = FrozenBatchNorm(4)
    x = torch.rand(1, 4, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    y = frozen(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None and x.grad.any()


def test_freezing_and_momentum() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4)))
    set_norm_momentum(module, 0.01)
    assert module[1].momentum == module[2][0].momentum == 0.01
    module(torch.rand(8, 3, 4, 4))
    mean = module[1].running_mean.clone()
    freeze(module, [""])
    assert isinstance(module[1], FrozenBatchNorm) and isinstance(module[2][0], FrozenBatchNorm)
    assert not any(p.requires_grad for p in module.parameters())
    module.train()(torch.rand(8, 3, 4, 4))
    assert torch.equal(module[1].running_mean, mean)
    # SyncBN conversion must not revive it
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(converted[1], FrozenBatchNorm)


def test_a_frozen_norm_keeps_epsilon_and_activation() -> None:
    """timm's norms may have another epsilon than ours, and hold the activation."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct2d(8, eps=1e-1, act_layer=nn.SiLU), nn.Dropout(0.5))
    module(torch.randn(8, 3, 4, 4))  # statistics worth keeping
    x, keys = torch.randn(2, 3, 4, 4), module.state_dict().keys()
    expected = module.eval()(x)
    freeze(module, ["1"])
    assert isinstance(module[1], FrozenBatchNorm) and module.state_dict().keys() == keys
    assert torch.equal(module(x), expected)
    assert torch.equal(module.train()[:2](x), expected)
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]


def test_a_norm_without_memory_is_frozen_there() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.BatchNorm2d(4))
    freeze(module, ["0"])
    assert isinstance(module[0], FrozenBatchNorm) and module[0].weight.is_meta


def test_norms_over_all_workers_keep_their_activation() -> None:
    module = nn.Sequential(nn.BatchNorm2d(4), BatchNormAct2d(4, act_layer=nn.SiLU), FrozenBatchNorm(4))
    x = torch.randn(2, 4, 3, 3)
    expected = module.eval()(x)
    synchronised = synchronise_norms(module)
    assert [isinstance(norm, nn.SyncBatchNorm) for norm in synchronised] == [True, True, False]
    assert torch.equal(synchronised(x), expected)
