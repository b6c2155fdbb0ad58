"""EoMT beside its definition: both flavours of backbone, annealing as a function of the step, options, canvases."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from panoptic.backbones import Backbone
from panoptic.models.eomt.annealing import certain, mask_probability, published_phases
from panoptic.models.eomt.model import EoMT, EoMTConfig
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.segmentation import Categories, Frame
from panoptic.training.compiling import CompiledGraphs, compile_network
from panoptic.training.device import Engine, prepare
from panoptic.training.optim import Optim, build_ema, build_optimiser, update_ema
from panoptic.training.step import SkipCounter, train_step
from tests.panoptic.models.mask2former.test_model import batch
from tests.support.small import SMALL_EOMT

FLAVOURS = {
    "dinov2": "vit_small_patch14_reg4_dinov2",
    "gated": "vit_giant_patch14_reg4_dinov2",
    "dinov3": "vit_small_patch16_dinov3_qkvb",
    "plain": "vit_tiny_patch16_224",
}


def built(categories: Categories, name: str = "dinov2", **options: Any) -> EoMT:
    """With layer scales, biases and positions that are worth comparing."""
    torch.manual_seed(0)
    model = replace(SMALL_EOMT, backbone=Backbone(FLAVOURS[name]), **options).build(categories)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("gamma", "gamma_1", "gamma_2")):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1 or key.endswith(("pos_embed", "cls_token", "reg_token")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def rotated(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """DINOv3's rotation of heads [B, heads, h w, d], token by token and channel by channel."""
    height, width = grid
    d = x.shape[-1]
    out = torch.empty_like(x)
    for token in range(height * width):
        y = 2 * (token // width + 0.5) / height - 1
        z = 2 * (token % width + 0.5) / width - 1
        for channel in range(d):
            k = channel % (d // 2)  # the angles of the second half are those of the first
            coordinate, m = (y, k) if k < d // 4 else (z, k - d // 4)
            angle = 2 * math.pi * coordinate / 100 ** (4 * m / d)
            other = -x[:, :, token, channel + d // 2] if channel < d // 2 else x[:, :, token, channel - d // 2]
            out[:, :, token, channel] = x[:, :, token, channel] * math.cos(angle) + other * math.sin(angle)
    return out


def plain_network(model: EoMT, images: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Class and mask logits without masks of attention, by the definition, from the weights by their names."""
    state = {key.removeprefix("backbone.body."): value for key, value in model.state_dict().items()}
    config, dinov3 = model.config, name == "dinov3"
    eps = 1e-5 if dinov3 else 1e-6
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.pixel_mean, config.pixel_std))
    x = F.conv2d((images - mean) / std, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    grid = (x.shape[2], x.shape[3])
    patches, count = x.flatten(2).transpose(1, 2), grid[0] * grid[1]
    front = [state[key].expand(len(x), -1, -1) for key in ("cls_token", "reg_token") if key in state]
    if name == "plain":  # its class token has a position
        tokens = torch.cat([*front, patches], 1) + state["pos_embed"]
    else:
        tokens = torch.cat([*front, patches + (0 if dinov3 else state["pos_embed"])], 1)
    for index in range(config.depth):
        if index == config.depth - config.query_blocks:
            tokens = torch.cat([state["queries.weight"].expand(len(x), -1, -1), tokens], 1)
        part = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"blocks.{index}.")}
        normed = F.layer_norm(tokens, (config.width,), part["norm1.weight"], part["norm1.bias"], eps)
        bias = part.get("attn.qkv.bias")
        if dinov3:  # keys have none
            bias = torch.cat([part["attn.q_bias"], torch.zeros(config.width), part["attn.v_bias"]])
        q, k, v = F.linear(normed, part["attn.qkv.weight"], bias).chunk(3, 2)
        q, k, v = (t.unflatten(2, (config.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if dinov3:
            q, k = (torch.cat([t[:, :, :-count], rotated(t[:, :, -count:], grid)], 2) for t in (q, k))
        attention = (q @ k.transpose(2, 3) / (config.width // config.heads) ** 0.5).softmax(3)
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        out = F.linear(mixed, part["attn.proj.weight"], part["attn.proj.bias"])
        tokens = tokens + part.get("ls1.gamma", part.get("gamma_1", torch.ones(()))) * out
        normed = F.layer_norm(tokens, (config.width,), part["norm2.weight"], part["norm2.bias"], eps)
        hidden = F.linear(normed, part["mlp.fc1.weight"], part["mlp.fc1.bias"])
        if name == "gated":
            gate, value = hidden.chunk(2, 2)
            hidden = F.silu(gate) * value
        else:
            hidden = F.gelu(hidden)
        out = F.linear(hidden, part["mlp.fc2.weight"], part["mlp.fc2.bias"])
        tokens = tokens + part.get("ls2.gamma", part.get("gamma_2", torch.ones(()))) * out
    tokens = F.layer_norm(tokens, (config.width,), state["norm.weight"], state["norm.bias"], eps)
    queries, features = tokens[:, : config.queries], tokens[:, -count:].transpose(1, 2).unflatten(2, grid)
    for block in (0, 1):
        part = {key.split(".", 2)[2]: v for key, v in state.items() if key.startswith(f"upscale.{block}.")}
        features = F.gelu(F.conv_transpose2d(features, part["conv1.weight"], part["conv1.bias"], stride=2))
        features = F.conv2d(features, part["conv2.weight"], padding=1, groups=config.width).transpose(1, 3)
        features = F.layer_norm(features, (config.width,), part["norm.weight"], part["norm.bias"], 1e-6).transpose(1, 3)
    embedding = queries
    for layer in (0, 2, 4):
        embedding = F.linear(embedding, state[f"mask_head.{layer}.weight"], state[f"mask_head.{layer}.bias"])
        embedding = F.gelu(embedding) if layer < 4 else embedding
    classes = F.linear(queries, state["class_head.weight"], state["class_head.bias"])
    return classes, torch.einsum("bqc,bchw->bqhw", embedding, features)


@pytest.mark.parametrize("name", FLAVOURS)
def test_the_network_is_that_of_the_definition(name: str, small_categories) -> None:
    model = built(small_categories, name).eval()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        outputs = model.network(images)
        classes, masks = plain_network(model, images, name)
    torch.testing.assert_close(outputs["classes"], classes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mask_products(outputs["embeddings"], outputs["features"]), masks, rtol=1e-4, atol=1e-3)


def test_annealing_is_the_published_one(shared) -> None:
    (record,) = json.loads(shared("fixtures/eomt/schedule.json").read_text())
    said = record["annealing"]
    phases = published_phases(3, record["total"])
    assert [start for start, _ in phases] == said["start"] and [end for _, end in phases] == said["end"]
    for step, expected in said["probabilities"].items():
        found = [float(mask_probability(torch.tensor(int(step)), *phase)) for phase in phases]
        assert found == pytest.approx(expected, abs=1e-6), step
        assert [certain(int(step), *phase) for phase in phases] == [probability == 1 for probability in expected], step


def test_published_phases_of_other_backbones() -> None:
    assert [start for start, _ in published_phases(4, 88_692)] == [14_782, 29_564, 44_346, 59_128]
    assert [start for start, _ in published_phases(5, 88_692)] == [14_782, 25_869, 36_955, 48_042, 59_128]
    assert published_phases(1, 600) == ((100, 200),)
    assert all(certain(step, 5, 5) == (step < 5) for step in range(9))
    assert float(mask_probability(torch.tensor(5), 5, 5)) == 0


def steps(model: EoMT, batches: Any, first: int, last: int, total: int = 12) -> list[float]:
    optim = Optim(optimiser="sgd", lr=1e-2, momentum=0.0)  # nothing else to store
    optimiser, health = build_optimiser(model, optim), SkipCounter()
    return [
        float(
            train_step(
                model, optimiser, [batches], step=step, total=total, optim=optim, engine=Engine(), health=health
            ).losses["total"]
        )
        for step in range(first, last)
    ]


def test_a_continued_training_masks_as_if_it_had_not_stopped(small_categories) -> None:
    """The step alone says how far masks are trained away; nothing of it is stored."""
    images_and_targets = batch(small_categories, (3, 5))
    model = prepare(built(small_categories), "cpu", Engine()).train()
    assert not any("step" in key for key in model.state_dict())
    whole, parted = copy.deepcopy(model), copy.deepcopy(model)
    expected = steps(whole, images_and_targets, 0, 9)
    found = steps(parted, images_and_targets, 0, 6)
    again = built(small_categories).train()
    again.load_state_dict(parted.state_dict())
    assert found + steps(again, images_and_targets, 6, 9) == expected
    # at another step of the run the same weights and draws lose something else
    other = built(small_categories).train()
    other.load_state_dict(parted.state_dict())
    assert steps(other, images_and_targets, 6, 7, total=1000) != expected[6:7]


def test_masks_hide_nothing_at_the_end(small_categories) -> None:
    """With all masks trained away the last prediction in training is that of the evaluation."""
    model = built(small_categories).train()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        masked = model.network(images)
        model.begin_step(11, 12)
        opened = model.network(images)
        evaluated = model.eval().network(images)
    assert evaluated.keys() == {"classes", "embeddings", "features"}
    torch.testing.assert_close(opened["classes"], evaluated["classes"])
    assert not torch.allclose(masked["classes"], evaluated["classes"], atol=1e-3)


def test_no_average_mixes_what_belongs_to_the_step(small_categories) -> None:
    model = built(small_categories).train()
    ema = build_ema(model, 0.9)
    assert ema is not None
    for step in range(3):
        model.begin_step(step, 12)
        update_ema(ema, model, 0.9)
    assert int(ema.module.step) == 2
    floating = {name for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    assert floating == {"pixels.mean", "pixels.std"}


def test_the_log_says_that_validations_are_without_masks(small_categories) -> None:
    note = built(small_categories).training_note(600)
    assert "100 to 200, 400 to 500" in note and "without masks" in note and "before step 500" in note
    assert built(small_categories, masked_attention=False).training_note(600) == ""


def test_a_graph_is_compiled_anew_only_where_a_block_begins_to_anneal(small_categories) -> None:
    torch._dynamo.reset()
    model = built(small_categories).train()
    compile_network(model, backend="eager", fullgraph=True)
    images, graphs, made = torch.zeros(2, 3, 64, 96, dtype=torch.uint8), CompiledGraphs(), {}
    for step in range(13):
        model.begin_step(step, 12)  # phases 2 to 4 and 8 to 10
        with torch.no_grad():
            model.network(images)
        made[step] = graphs.new()
    torch._dynamo.reset()
    assert {step for step, count in made.items() if count} == {0, 3, 9}


def test_heads_are_what_the_option_says(small_categories) -> None:
    two, four = built(small_categories), built(small_categories, heads=4)
    four.load_state_dict(two.state_dict())
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        first, second = (model.eval().network(images)["classes"] for model in (two, four))
    assert four.backbone.body.blocks[0].attn.num_heads == 4 and (first - second).abs().max() > 1e-5


def test_a_canvas_that_is_cut_by_a_patch_is_filled_up(small_categories) -> None:
    """Black at the right and the bottom; masks, targets and maps agree about it."""
    model = built(small_categories).eval()
    images = torch.randint(1, 256, (1, 3, 60, 90), dtype=torch.uint8)
    whole = F.pad(images, (0, 6, 0, 4))
    size = torch.tensor([[60, 90]])
    with torch.no_grad():
        outputs, filled = model.network(images, Frame((60, 90), size, size)), model.network(whole)
        assert all(torch.equal(outputs[name], filled[name]) for name in filled)
        (cut,) = model.postprocess(outputs, Frame((60, 90), size, size)).maps or ()
        (full,) = model.postprocess(outputs, Frame((64, 96), size, size)).maps or ()
    assert (cut.segments == full.segments).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_blocks": 5}, "query_blocks 5: the backbone has 4 blocks"),
        ({"divisor": 40}, "divisor 40: must be a multiple of the patch, 16"),
        ({"anneal_starts": (1, 2)}, "both or none"),
        ({"anneal_starts": (1,), "anneal_ends": (2,)}, "one for each of the 2 query_blocks"),
        ({"anneal_starts": (9, 9), "anneal_ends": (10, 8)}, "no end before its start"),
        ({"canvas": (64, 100)}, "canvas 64x100: both sides must be multiples"),
        ({"backbone": Backbone("resnet50")}, "cannot build 'resnet50' as a plain ViT"),
        ({"backbone": Backbone("vit_tiny_patch16_224", norm="group")}, r"backbone\.norm: EoMT's backbone"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict, message: str, small_categories) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL_EOMT, **options).build(small_categories)


def test_parameters_are_those_of_the_published_models(shared) -> None:
    """EoMT-S at 640 pixels, on a device without memory."""
    with torch.device("meta"):
        model = EoMTConfig(backbone=Backbone(FLAVOURS["dinov2"]), query_blocks=3).build(
            Categories.from_coco([{"id": k, "name": str(k), "isthing": 1} for k in range(133)])
        )
    head = shared("specs/keys/eomt_original.txt").read_text().splitlines()[0]
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in head


def test_frozen_quarters_of_the_backbone_do_not_move(small_categories) -> None:
    """The stem and the first two quarters; the queries, the later blocks and the heads learn."""
    model = replace(SMALL_EOMT, backbone=Backbone(FLAVOURS["dinov3"], freeze=3)).build(small_categories).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optim = Optim(optimiser="adamw", lr=1e-3)
    train_step(
        model,
        build_optimiser(model, optim),
        [batch(small_categories, (3, 5))],
        step=1,
        total=12,
        optim=optim,
        engine=Engine(),
        health=SkipCounter(),
    )
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    frozen = ("patch_embed", "cls_token", "reg_token", "blocks.0.", "blocks.1.")
    assert still == {name for name in before if name.removeprefix("backbone.body.").startswith(frozen)}


def test_a_backbone_that_is_frozen_as_a_whole_is_the_same_in_training(small_categories) -> None:
    """Its rotary positions are stretched no more; one that learns has them stretched."""
    images = torch.zeros(1, 3, 64, 96)
    for freeze, same in ((5, True), (4, False)):
        config = replace(SMALL_EOMT, backbone=Backbone(FLAVOURS["dinov3"], freeze=freeze))
        backbone = config.build(small_categories).train().backbone
        positions = [backbone.embed(images)[1] for _ in range(2)]
        assert torch.equal(*positions) is same
