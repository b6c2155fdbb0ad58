"""Rates by block of plain ViTs and their two warm-ups, against EoMT's own and by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from panoptic.backbones.stages import freeze_vit, stage_of, vit_layer
from panoptic.training.optim import (
    Optim,
    build_optimiser,
    learning_rate_factor,
    parameter_groups,
    set_learning_rate,
)

EOMT = Optim(
    optimiser="adamw",
    lr=1e-4,
    weight_decay=0.05,
    decay="all",
    layer_decay=0.8,
    warmup_steps=500,
    warmup_factor=0.0,
    backbone_warmup_steps=1000,
    schedule_start="after_warmup",
    clip_norm=0.01,
)
"""The published recipe on DINOv2."""

DINOV3 = Optim(
    optimiser="adamw",
    lr=2e-4,
    layer_decay=0.8,
    undecayed_layers=4,
    warmup_steps=2000,
    warmup_factor=0.0,
    backbone_warmup_steps=3000,
    schedule_start="after_warmup",
)
"""The published recipe on DINOv3's ViT-L, whose last four blocks hold queries."""


class Vit(VisionTransformer):
    """timm's plain ViT as a backbone, with a part of its own that no published file has."""

    def __init__(self, depth: int) -> None:
        super().__init__(128, 16, embed_dim=96, depth=depth, num_heads=6, reg_tokens=4, init_values=1e-5, num_classes=0)
        self.depth = depth
        self.pyramid = nn.Conv2d(96, 8, 1)

    def layer_of(self, name: str) -> int | None:
        return None if name.startswith("pyramid.") else vit_layer(name, self.depth)


def model_of(depth: int) -> nn.ModuleDict:
    with torch.device("meta"):
        upscale = nn.ModuleList(
            nn.ModuleDict(
                {
                    "conv1": nn.ConvTranspose2d(96, 96, 2, 2),
                    "conv2": nn.Conv2d(96, 96, 3, groups=96, bias=False),
                    "norm": nn.LayerNorm(96),
                }
            )
            for _ in range(2)
        )
        linears = [part for _ in range(3) for part in (nn.Linear(96, 96), nn.GELU())][:-1]
        heads = {"q": nn.Embedding(16, 96), "class_head": nn.Linear(96, 8), "mask_head": nn.Sequential(*linears)}
        return nn.ModuleDict({"backbone": Vit(depth), **heads, "upscale": upscale})


def factors(model: nn.Module, optim: Optim) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["lr_factor"] for group in parameter_groups(model, optim) for p in group["params"]}


def rates(model: nn.Module, optim: Optim, step: int, total: int) -> dict[str, float]:
    """The rate of every parameter as a step sets it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimiser = build_optimiser(model, optim)
    both = [optim.lr * learning_rate_factor(step, total, optim, backbone=backbone) for backbone in (False, True)]
    set_learning_rate(optimiser, *both)
    return {names[id(p)]: group["lr"] for group in optimiser.param_groups for p in group["params"]}


def test_every_rate_is_the_reference_s(shared) -> None:
    (reference,) = json.loads((shared("fixtures/eomt") / "schedule.json").read_text())
    model = model_of(5)
    del model["backbone"].pyramid
    ours = {
        name: name.removeprefix("network.").replace("encoder.backbone.", "backbone.") for name in reference["base_lr"]
    }
    assert set(ours.values()) == {name for name, _ in model.named_parameters()}
    base = {ours[name]: value / EOMT.lr for name, value in reference["base_lr"].items()}
    assert factors(model, EOMT) == pytest.approx(base, rel=1e-9)
    assert {group["weight_decay"] for group in parameter_groups(model, EOMT)} == set(reference["weight_decay"])
    for step, expected in reference["steps"].items():
        own = rates(model, EOMT, int(step), reference["total"])
        assert {name: own[ours[name]] for name in expected} == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(
    ("depth", "held", "optim", "embeddings", "expected"),
    [
        (12, 0, EOMT, 8.589934592e-6, {0: 8.589934592e-6, 8: 5.12e-5, 9: 6.4e-5, 10: 8e-5, 11: 1e-4}),  # S, B
        (24, 0, EOMT, 5.902958103587e-7, {0: 5.902958103587e-7, 19: 4.096e-5, 22: 8e-5, 23: 1e-4}),  # L
        (40, 0, EOMT, 1.661534994731e-8, {0: 1.661534994731e-8, 34: 3.2768e-5, 39: 1e-4}),  # g
        (12, 3, DINOV3, 1.7179869184e-5, {0: 1.7179869184e-5, 8: 1.024e-4, 9: 2e-4, 11: 2e-4}),  # S, B
        (24, 4, DINOV3, 1.1805916207174e-6, {18: 6.5536e-5, 19: 8.192e-5, 20: 2e-4, 23: 2e-4}),  # L
    ],
)
def test_rates_of_the_published_configurations(depth, held, optim, embeddings, expected) -> None:
    own = factors(model_of(depth), replace(optim, undecayed_layers=held))
    own = {name: optim.lr * factor for name, factor in own.items()}
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "cls_token", "reg_token"):
        assert own[f"backbone.{name}"] == pytest.approx(embeddings, rel=1e-9)
    for block, rate in expected.items():
        values = [value for name, value in own.items() if name.startswith(f"backbone.blocks.{block}.")]
        assert len(values) == 14 and values == pytest.approx([rate] * 14, rel=1e-9)
    whole = ("backbone.norm.weight", "backbone.pyramid.weight", "q.weight", "class_head.bias", "upscale.1.norm.weight")
    assert {own[name] for name in whole} == {optim.lr}


@pytest.mark.parametrize(
    ("optim", "total", "step", "head", "backbone"),
    [
        (EOMT, 88_692, 0, 0.0, 0.0),
        (EOMT, 88_692, 250, 0.5, 0.0),
        (EOMT, 88_692, 500, 1.0, 0.0),
        (EOMT, 88_692, 1000, (1 - 500 / 88_192) ** 0.9, 0.5),
        (EOMT, 88_692, 1500, (1 - 1000 / 88_192) ** 0.9, 1.0),
        (EOMT, 88_692, 44_846, (1 - 44_346 / 88_192) ** 0.9, (1 - 43_346 / 87_192) ** 0.9),
        (EOMT, 88_692, 88_692, 0.0, 0.0),
        (EOMT, 177_384, 1500, (1 - 1000 / 176_884) ** 0.9, 1.0),
        (EOMT, 39_120, 20_000, (1 - 19_500 / 38_620) ** 0.9, (1 - 18_500 / 37_620) ** 0.9),  # ADE20K
        (DINOV3, 88_692, 1999, 0.9995, 0.0),
        (DINOV3, 88_692, 2001, (1 - 1 / 86_692) ** 0.9, 1 / 3000),
        (DINOV3, 177_384, 5000, (1 - 3000 / 175_384) ** 0.9, 1.0),
    ],
)
def test_the_two_warm_ups(optim: Optim, total: int, step: int, head: float, backbone: float) -> None:
    assert learning_rate_factor(step, total, optim) == pytest.approx(head, rel=1e-12)
    assert learning_rate_factor(step, total, optim, backbone=True) == pytest.approx(backbone, rel=1e-12)


def test_a_second_warm_up_multiplies_other_schedules_too() -> None:
    optim = Optim(schedule="cosine", warmup_steps=10, warmup_factor=0.0, backbone_warmup_steps=20)
    whole = Optim(schedule="cosine")
    for step, head, backbone in ((5, 0.5, 0.0), (10, 1.0, 0.0), (20, 1.0, 0.5), (30, 1.0, 1.0), (70, 1.0, 1.0)):
        factor = learning_rate_factor(step, 100, whole)
        assert learning_rate_factor(step, 100, optim) == pytest.approx(head * factor)
        assert learning_rate_factor(step, 100, optim, backbone=True) == pytest.approx(backbone * factor)
    late = Optim(schedule="cosine", warmup_steps=10, schedule_start="after_warmup")
    assert learning_rate_factor(55, 100, late) == pytest.approx(0.5) and learning_rate_factor(10, 100, late) == 1
    short = Optim(warmup_steps=500, warmup_factor=0.0, backbone_warmup_steps=1000, schedule_start="after_warmup")
    assert learning_rate_factor(99, 100, short, backbone=True) == 0  # of a run that ends before
    assert learning_rate_factor(99, 100, short) == pytest.approx(99 / 500)


def test_one_warm_up_for_all_sets_the_rates_of_old() -> None:
    model = model_of(4)
    optim = Optim(backbone_lr=0.5, warmup_steps=10)
    for step in (0, 5, 10, 50):
        factor = learning_rate_factor(step, 100, optim)
        assert learning_rate_factor(step, 100, optim, backbone=True) == factor
        own = rates(model, optim, step, 100)
        assert own["class_head.weight"] == optim.lr * factor and own["backbone.norm.bias"] == optim.lr * factor * 0.5


def test_vitdet_s_rule() -> None:
    """lr * d^(n - i) for block i of n, counted from 0, and d^(n + 1) for the embeddings."""
    own = factors(model_of(12), Optim(layer_decay=0.7, layer_decay_embeddings=True, backbone_lr=0.7))
    for block in range(12):
        assert own[f"backbone.blocks.{block}.attn.qkv.bias"] == pytest.approx(0.7 ** (12 - block))
    assert own["backbone.pos_embed"] == own["backbone.patch_embed.proj.bias"] == pytest.approx(0.7**13)
    assert own["backbone.pyramid.bias"] == own["q.weight"] == 1


def test_only_positions_norms_and_one_dimension_are_not_decayed() -> None:
    model = model_of(2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, Optim(weight_decay=0.1, decay="weights_and_biases", layer_decay=0.7))
    free = {names[id(p)] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    norms = {name for name in names.values() if ".norm" in name}
    assert free == norms | {"backbone.pos_embed", "q.weight"}


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3_qkvb"])
def test_timm_s_vits_have_layers_and_stages(name: str) -> None:
    from panoptic.backbones.vit import ViT

    with torch.device("meta"):
        vit = ViT(name, (64, 64), width=24, depth=4, heads=2)
        model = nn.ModuleDict({"backbone": vit, "head": nn.Linear(2, 2)})
    own = factors(model, Optim(layer_decay=0.5))
    assert set(own) == {name for name, _ in model.named_parameters()}
    for key, factor in own.items():
        inner = key.removeprefix("backbone.body.")
        block = int(inner.split(".")[1]) if inner.startswith("blocks.") else 3 if inner.startswith("norm.") else 0
        assert factor == (1 if key.startswith("head") else 0.5 ** (3 - block)), key
    vit.freeze_stages(3)
    assert {key for key in own if not model.get_parameter(key).requires_grad} == {
        key for key, factor in own.items() if factor < 0.5 and not key.startswith("head")
    }


def test_what_layers_cannot_give_is_refused() -> None:
    from panoptic.backbones import Backbone

    with pytest.raises(ValueError, match=r"optim\.stage_decay 0\.7 and optim\.layer_decay 0\.8: both"):
        Optim(stage_decay=0.7, layer_decay=0.8)
    with torch.device("meta"):
        resnet = nn.ModuleDict({"backbone": Backbone("resnet18").build(), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"optim\.layer_decay 0\.8: the backbone is no plain ViT.*stage_decay"):
        parameter_groups(resnet, Optim(layer_decay=0.8))


@pytest.mark.parametrize("depth", [3, 5, 12, 24])
def test_stages_of_a_plain_vit_are_quarters_of_its_blocks(depth: int) -> None:
    frozen = []
    for count in range(6):
        with torch.device("meta"):
            vit = Vit(depth)
        freeze_vit(vit, depth, count)
        frozen.append({name for name, p in vit.named_parameters() if not p.requires_grad and "pyramid" not in name})
    assert frozen[0] == set()
    assert frozen[1] == {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    blocks = [len({name.split(".")[1] for name in names if name.startswith("blocks.")}) for names in frozen[1:]]
    assert blocks == [-(-depth * k // 4) for k in range(5)]
    assert frozen[5] == {name for name, _ in vit.named_parameters() if "pyramid" not in name}
    assert not any(name.startswith("norm.") for name in frozen[4])
    for stage in range(5):  # rates by stages follow what freezes
        assert frozen[stage + 1] - frozen[stage] == {n for n in frozen[5] if stage_of(vit, n) == stage}
