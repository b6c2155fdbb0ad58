"""Frozen stages cost no more than their forward pass: no graph below the boundary, nothing kept for a backward pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from panoptic.backbones import Backbone
from panoptic.backbones.config import STAGES, STEM_AND_STAGES
from panoptic.backbones.stages import stage_of
from panoptic.layers.norm import BATCH_NORMS, FrozenBatchNorm
from panoptic.training.config import Engine
from panoptic.training.device import autocast, prepare
from panoptic.training.freezing import training_mode

FAMILIES = (
    *("resnet18", "resnet14_double3x3", "vgg16_bn", "res2net14_26w_4s", "swin_tiny", "efficientps_b0"),
    *("tf_efficientnet_lite0", "convnext_femto", "regnetx_002", "mobilenetv3_small_050"),
)
"""A backbone of each kind: our own, and pyramids of timm."""

VIT = "vit_tiny_patch16_224"

IMAGES = (1, 3, 64, 64)


def blank(config: Backbone) -> tuple[Any, Tensor]:
    """A backbone in training mode and images, without memory: graphs are made there as elsewhere."""
    with torch.device("meta"):
        backbone, images = config.build(), torch.zeros(IMAGES)
    training_mode(backbone)
    return backbone, images


def kept_by(backbone: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], int]:
    """The features, and the bytes that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        features = backbone(images)
    return features, sum(kept.values())


def note_graph(graphs: dict[str, bool], key: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
    """A forward hook that notes whether the output of a module has a graph."""
    graphs[key] = output.requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_no_graph_lies_below_the_boundary(name: str) -> None:
    """Features of frozen stages have no graph, those above have one; the more is frozen, the less is kept."""
    sizes = []
    for freeze in range(6):
        backbone, images = blank(Backbone(name, freeze=freeze))
        features, size = kept_by(backbone, images)
        sizes.append(size)
        learning = [stage for stage, feature in features.items() if feature.requires_grad]
        assert learning == [stage for stage in STEM_AND_STAGES[freeze:] if stage in features]
        assert all(stage_of(backbone, key) >= freeze for key, p in backbone.named_parameters() if p.requires_grad)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[4] > sizes[5] == 0


def test_no_graph_lies_below_the_boundary_of_a_plain_vit() -> None:
    """Its pyramid always learns; its blocks below the boundary have no graph."""
    sizes = []
    for freeze in range(6):
        backbone, images = blank(Backbone(VIT, freeze=freeze))
        graphs: dict[str, bool] = {}
        for key, block in backbone.body.get_submodule("blocks").named_children():
            block.register_forward_hook(partial(note_graph, graphs, key))
        features, size = kept_by(backbone, images)
        sizes.append(size)
        assert list(features) == list(STAGES) and all(feature.requires_grad for feature in features.values())
        for key, graph in graphs.items():
            assert graph == (stage_of(backbone, f"body.blocks.{key}.norm1.weight") >= freeze)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 * sizes[5]


@pytest.mark.parametrize("name", ["resnet18", "vgg16_bn", "efficientps_b0", "tf_efficientnet_lite0"])
def test_frozen_norms_are_constant_in_training(name: str) -> None:
    """Batch norms of frozen stages are constants, and count nothing; the features are those of evaluation."""
    backbone = Backbone(name, freeze=5).build()
    training_mode(backbone)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.rand(IMAGES)
    training = backbone(images)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not [norm for norm in backbone.modules() if isinstance(norm, BATCH_NORMS)]
    assert any(isinstance(norm, FrozenBatchNorm) for norm in backbone.modules())
    evaluated = backbone.eval()(images)
    assert all(torch.equal(feature, evaluated[stage]) for stage, feature in training.items())


def test_a_frozen_backbone_skips_no_paths() -> None:
    """timm gives some models paths that training skips at random; those of frozen parts are all taken."""
    backbone: Any = Backbone("focalnet_tiny_srf").build()
    images = torch.rand(4, 3, 64, 64)
    training_mode(backbone)
    assert not torch.equal(backbone(images)["res5"], backbone(images)["res5"])
    backbone.freeze_stages(5)
    training_mode(backbone)
    assert torch.equal(backbone(images)["res5"], backbone(images)["res5"])


def test_a_frozen_norm_of_timm_has_the_numbers_and_the_keys_of_timms_own() -> None:
    """Its keys have no counter, so that checkpoints of frozen pyramids go on loading."""
    from timm.layers.norm_act import freeze_batch_norm_2d

    torch.manual_seed(0)
    learning = Backbone("tf_efficientnet_lite0").build()
    for norm in learning.modules():
        if isinstance(norm, BATCH_NORMS):
            for value in (norm.weight, norm.running_var):
                nn.init.uniform_(value, 0.5, 1.5)  # type: ignore[arg-type]
            for value in (norm.bias, norm.running_mean):
                nn.init.normal_(value)  # type: ignore[arg-type]
    frozen = Backbone("tf_efficientnet_lite0", freeze=5).build()
    frozen.load_state_dict(learning.state_dict(), strict=False)
    theirs = freeze_batch_norm_2d(learning)
    assert frozen.state_dict().keys() == theirs.state_dict().keys()
    images = torch.rand(1, 3, 64, 96)
    for stage, feature in frozen.train()(images).items():
        torch.testing.assert_close(feature, theirs(images)[stage], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("freeze", [0, 5])
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
@pytest.mark.usefixtures("half_precision")
def test_frozen_or_not_features_have_one_precision_and_memory_format(name: str, freeze: int) -> None:
    """In bfloat16 and channels-last, from the images to the last map, so that nothing is converted on the way."""
    engine = Engine(precision="bfloat16", channels_last=True)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Backbone(name, freeze=freeze).build()

    model: Any = prepare(Whole(), "cpu", engine)  # type: ignore[arg-type]
    images = torch.rand(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with autocast(images, engine):
        features = model.train().backbone(images)
    for feature in features.values():
        assert feature.dtype == torch.bfloat16 and feature.is_contiguous(memory_format=torch.channels_last)
