"""Checkpoints of MaskFormer and Mask2Former under the names of both projects; Hugging Face's classes beside ours."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
import torch

from panoptic.convert import convert
from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.mask_transformer.masks import mask_logits
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.segmentation import Categories, Sample, Targets, collate
from tests.conftest import draw_segmentation

KINDS = {"maskformer": MaskFormerConfig, "mask2former": Mask2FormerConfig}
FEW = Categories.from_coco([{"id": i, "name": f"class {i}", "isthing": i < 3} for i in range(6)])


def categories(count: int) -> Categories:
    return Categories.from_coco([{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(count)])


def shapes(shared, name: str) -> dict[str, torch.Tensor]:
    """A state dict of the published names and shapes that takes no memory."""
    lines = shared(f"specs/keys/{name}.txt").read_text().splitlines()
    pairs = (re.match(r"(\S+)\s+(\([^)]*\))", line).groups() for line in lines)
    return {key: torch.zeros(()).expand(ast.literal_eval(shape)) for key, shape in pairs}


def published(shared, name: str) -> dict[str, torch.Tensor]:
    """Names and shapes of a model, with its class weights."""
    state = shapes(shared, name)
    return {**state, "criterion.empty_weight": class_weights(len(state["criterion.empty_weight"]))}


def class_weights(count: int, no_object: float = 0.1) -> torch.Tensor:
    return torch.cat([torch.ones(count - 1), torch.tensor([no_object])])


PUBLISHED = [
    ("maskformer_fpn_original", "maskformer", dict(encoder_layers=0, decoder_layers=6, divisor=1)),
    ("maskformer_r50_original", "maskformer", dict(encoder_layers=6, hidden=2048, queries=100)),
    ("maskformer_transformers", "transformers", dict(encoder_layers=0, channels=256, mask_channels=256)),
    ("mask2former_r50_original", "mask2former", dict(encoder_layers=6, decoder_layers=9, points_per_level=4)),
    ("mask2former_transformers", "transformers", dict(encoder_hidden=1024, decoder_hidden=2048, queries=100)),
]


@pytest.mark.parametrize(("name", "source", "expected"), PUBLISHED)
def test_published_names(shared, name: str, source: str, expected: dict) -> None:
    state = published(shared, name)
    config, converted = convert(state, source, categories(133))
    assert isinstance(config, KINDS[name.split("_")[0]])
    assert {field: getattr(config, field) for field in expected} == expected
    norm = "batch" if "transformers" in name else "frozen"
    assert (config.backbone.name, config.backbone.norm, config.no_object_weight) == ("resnet50", norm, 0.1)
    with torch.device("meta"):
        model = config.build(categories(133))
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in converted.items()}
    count = sum(p.numel() for p in model.parameters())
    named = sum(v.numel() for k, v in state.items() if not re.search(r"criterion|running_|num_batches", k))
    frozen = sum(v.numel() for k, v in model.backbone.named_buffers() if re.search(r"(weight|bias)$", k))
    assert count + frozen == named


@pytest.mark.parametrize(("name", "source", "expected"), PUBLISHED)
def test_every_key_is_accounted_for(shared, name: str, source: str, expected: dict) -> None:
    state = published(shared, name)
    extra = next(key for key in state if "pixel_decoder" in key or "pixel_level_module.decoder" in key) + "_more"
    with pytest.raises(ValueError, match=re.escape(extra)):
        convert({**state, extra: torch.zeros(1)}, source, categories(133))
    head = next(key for key in state if re.search(r"class_(embed|predictor)\.bias", key))
    with pytest.raises(ValueError, match=r"missing .*class_head\.bias"):
        convert({k: v for k, v in state.items() if k != head}, source, categories(133))
    with pytest.raises(ValueError, match="133 classes, the list has 19"):
        convert(state, source, categories(19))


def test_older_files(shared) -> None:
    """Names of before the pixel decoder was a module of its own, and of before the queries' content was learnt."""
    state = published(shared, "maskformer_fpn_original")
    older = {key.replace(".pixel_decoder.", "."): value for key, value in state.items() if "criterion" not in key}
    assert convert(older, "maskformer", categories(133))[0].no_object_weight == 0.1
    state = published(shared, "mask2former_r50_original")
    older = {key.replace(".pixel_decoder.", ".").replace("query_feat", "static_query"): v for key, v in state.items()}
    assert (
        convert(older, "mask2former", categories(133))[1].keys()
        == convert(state, "mask2former", categories(133))[1].keys()
    )


def test_a_stem_of_three_convolutions_is_the_published_one() -> None:
    """R101c, whose blocks of the last stage are dilated by factors that leave no trace in the weights."""
    from panoptic.backbones import Backbone
    from panoptic.convert.maskformer import common

    for stem, expected in (("deeplab", (1, 2, 4)), ("conv7", (1, 1, 1))):
        backbone = Backbone("resnet101", stem=stem).build().state_dict()
        weights = {f"backbone.{key}": value for key, value in backbone.items()} | {
            "class_head.weight": torch.zeros(20, 8)
        }
        fields, _ = common(weights, categories(19))
        assert (fields["backbone"].name, fields["backbone"].multigrid) == ("resnet101", expected)


def test_class_weights_are_read(shared) -> None:
    state = published(shared, "maskformer_fpn_original")
    state["criterion.empty_weight"] = class_weights(134, 0.4)
    assert convert(state, "maskformer", categories(133))[0].no_object_weight == pytest.approx(0.4)
    state["criterion.empty_weight"] = torch.full((134,), 0.5)
    with pytest.raises(ValueError, match="empty_weight is not 1"):
        convert(state, "maskformer", categories(133))


@pytest.mark.parametrize("name", ["maskformer_fpn_original", "mask2former_r50_original"])
def test_swin_of_the_originals(shared, name: str) -> None:
    state = {key: value for key, value in published(shared, name).items() if not key.startswith("backbone.")}
    state |= {f"backbone.{key}": value for key, value in shapes(shared, "swin_t_original").items()}
    widths = {"input_proj.weight": 768, "layer_4.weight": 768, "adapter_3.weight": 384, "adapter_2.weight": 192}
    widths |= {"adapter_1.weight": 96, "input_proj.0.0.weight": 768, "input_proj.1.0.weight": 384}
    for key, value in state.items():
        for end, width in (widths | {"input_proj.2.0.weight": 192}).items():
            if key.endswith(end):
                state[key] = value[:, :1].expand(-1, width, -1, -1)
    config, converted = convert(state, name.split("_")[0], categories(133))
    assert (config.backbone.name, config.backbone.drop_path) == ("swin_tiny", 0.3)
    assert "backbone.layers.2.blocks.5.attn.qkv.weight" in converted
    with torch.device("meta"):
        assert config.build(categories(133)).state_dict().keys() == converted.keys()


def batch() -> tuple[torch.Tensor, Targets]:
    """Two drawn images of one size, with a segment that is a crowd in none."""
    samples = []
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        truth = draw_segmentation(rng, 64, 96, FEW)
        samples.append(Sample(rng.integers(0, 256, (64, 96, 3), np.uint8), truth, str(seed)))
    return collate(samples, 32)


SIZES = {
    "maskformer": dict(fpn_feature_size=64, mask_feature_size=64),
    "mask2former": dict(
        **dict(feature_size=64, mask_feature_size=64, hidden_dim=64, encoder_feedforward_dim=32, dim_feedforward=48),
        **dict(encoder_layers=2, decoder_layers=4, num_queries=9, train_num_points=128),
    ),
}


@pytest.fixture(
    scope="module", params=["maskformer-resnet", "maskformer-swin", "mask2former-resnet", "mask2former-swin"]
)
def theirs(request):
    """Hugging Face's model with random weights, small but for its backbone."""
    transformers = pytest.importorskip("transformers")
    kind, backbone = request.param.split("-")
    names = ["stage1", "stage2", "stage3", "stage4"]
    if backbone == "resnet":
        widths = [64, 128, 256, 512]
        backbone = transformers.ResNetConfig(
            depths=[2, 2, 2, 2], hidden_sizes=widths, layer_type="basic", out_features=names
        )
    else:
        backbone = transformers.SwinConfig(out_features=names)
    if kind == "maskformer":
        sizes = dict(d_model=64, decoder_layers=2, decoder_ffn_dim=48, num_queries=9, encoder_layers=0)
        decoder = transformers.DetrConfig(**sizes, use_pretrained_backbone=False)
        config = transformers.MaskFormerConfig(
            swin_config=backbone, decoder_config=decoder, num_labels=len(FEW), **SIZES[kind]
        )
        made = transformers.MaskFormerForInstanceSegmentation
    else:
        config = transformers.Mask2FormerConfig(swin_config=backbone, num_labels=len(FEW), **SIZES[kind])
        made = transformers.Mask2FormerForUniversalSegmentation
    torch.manual_seed(0)
    model = made(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
    return model


def test_transformers_outputs_and_losses(theirs) -> None:
    config, weights = convert(theirs.state_dict(), "transformers", FEW)
    ours = config.build(FEW).eval()
    ours.load_state_dict(weights)
    if isinstance(config, Mask2FormerConfig):
        ours = type(ours)(type(config)(**{**vars(config), "loss_points": 128}), FEW).eval()
        ours.load_state_dict(weights)
    images, targets = batch()
    pixels = ours.pixels(images)
    counts = [int((row >= 0).sum()) for row in targets.labels]
    masks = [(targets.segments[b] == torch.arange(1, n + 1)[:, None, None]).float() for b, n in enumerate(counts)]
    classes = [targets.labels[b, :n] for b, n in enumerate(counts)]
    with torch.no_grad():
        torch.manual_seed(3)
        expected = theirs(pixels, mask_labels=masks, class_labels=classes)
        outputs = ours.forward_normalised(pixels)
        torch.manual_seed(3)
        losses = ours.loss(outputs, targets)
    every = torch.arange(config.queries)
    torch.testing.assert_close(outputs["classes"], expected.class_queries_logits, rtol=0, atol=1e-4)
    for b in range(2):
        torch.testing.assert_close(mask_logits(outputs, b, every), expected.masks_queries_logits[b], rtol=0, atol=1e-3)
    last = {name: value for name, value in losses.items() if "_" not in name}
    if isinstance(config, MaskFormerConfig):  # whose auxiliary losses there are not those of the original
        assert sum(last.values()).item() == pytest.approx(expected.loss.item(), rel=1e-4)
    else:
        assert sum(losses.values()).item() == pytest.approx(expected.loss.item(), rel=1e-4)


OLDER = (
    (r"encoder\.swin\.", "encoder."),
    (r"blocks\.(\d)\.attention\.q_proj", r"blocks.\1.attention.self.query"),
    (r"blocks\.(\d)\.attention\.k_proj", r"blocks.\1.attention.self.key"),
    (r"blocks\.(\d)\.attention\.v_proj", r"blocks.\1.attention.self.value"),
    (r"blocks\.(\d)\.attention\.o_proj", r"blocks.\1.attention.output.dense"),
    (r"attention\.relative_position_bias\.", "attention.self."),
    (r"blocks\.(\d)\.mlp\.fc1", r"blocks.\1.intermediate.dense"),
    (r"blocks\.(\d)\.mlp\.fc2", r"blocks.\1.output.dense"),
    (r"(layers\.\d+)\.mlp\.fc", r"\1.fc"),
    (r"o_proj", "out_proj"),
)
"""Names of transformers 5 as version 4 wrote them, which the published files have."""


def test_transformers_4(theirs) -> None:
    older = {}
    for key, value in theirs.state_dict().items():
        for rule, name in OLDER:
            key = re.sub(rule, name, key)
        older[key] = value
    config, weights = convert(older, "transformers", FEW)
    newer_config, newer = convert(theirs.state_dict(), "transformers", FEW)
    assert config == newer_config and weights.keys() == newer.keys()
    assert all(torch.equal(weights[key], newer[key]) for key in newer)
