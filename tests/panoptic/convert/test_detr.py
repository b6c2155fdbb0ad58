"""DETR's checkpoints under the names of both projects, and Hugging Face's own classes beside ours."""

from __future__ import annotations

import ast
import io
import re

import numpy as np
import pytest
import torch

from panoptic.backbones import Backbone
from panoptic.convert import convert
from panoptic.convert.detr import class_index
from panoptic.models.detr.model import DETRConfig
from panoptic.segmentation import Categories, Sample, collate
from panoptic.training.checkpoint import load, save
from panoptic.training.transfer import load_for_finetune
from tests.conftest import draw_segmentation

FEW = Categories(
    names=("person", "cat", "grass", "sky"),
    is_thing=(True, True, False, False),
    ids=(1, 17, 193, 187),
    colours=((0, 0, 0),) * 4,
)


def published(shared, name: str) -> dict[str, torch.Tensor]:
    """A state dict of the published names and shapes that takes no memory."""
    state = {}
    for line in shared(f"specs/keys/{name}.txt").read_text().splitlines():
        key, shape = re.match(r"(\S+)\s+(.*)", line).groups()
        state[key] = torch.zeros(()).expand(ast.literal_eval(shape.split("\t")[0]))
    return state


def older(key: str) -> str:
    """A name of transformers 5 as version 4 wrote it."""
    rules = (
        (r"backbone\.model\.", "backbone.conv_encoder.model."),
        (r"(layers\.\d+)\.mlp\.fc", r"\1.fc"),
        (r"o_proj", "out_proj"),
        (r"bbox_attention\.([qk])_proj", r"bbox_attention.\1_linear"),
        (r"mask_head\.conv([12])\.conv", r"mask_head.lay\1"),
        (r"mask_head\.conv([12])\.norm", r"mask_head.gn\1"),
        (r"mask_head\.output_conv", "mask_head.out_lay"),
    )
    for rule, name in rules:
        key = re.sub(rule, name, key)
    stage = re.match(r"mask_head\.fpn_stages\.(\d)\.(.+)", key)
    if stage is None:
        return key
    level = int(stage[1])
    inner = stage[2].replace("fpn_adapter", f"adapter{level + 1}")
    return "mask_head." + inner.replace("refine.conv", f"lay{level + 3}").replace("refine.norm", f"gn{level + 3}")


@pytest.mark.parametrize("version", ["original", "transformers 5", "transformers 4"])
@pytest.mark.parametrize("masks", [True, False])
def test_published_names(shared, version: str, masks: bool) -> None:
    source = version.split()[0]
    state = published(shared, f"detr_panoptic_{source}")
    if version == "transformers 4":
        state = {older(key): value for key, value in state.items()}
    if not masks:
        state = {key.removeprefix("detr."): value for key, value in state.items() if key.startswith("detr.")}
        head = "class_embed" if source == "original" else "class_labels_classifier"
        state |= {f"{head}.weight": torch.zeros(92, 256), f"{head}.bias": torch.zeros(92)}
    categories = FEW if masks else Categories(FEW.names[:2], (True, True), (1, 17), FEW.colours[:2])
    config, converted = convert(state, {"original": "detr"}.get(source, source), categories)
    assert isinstance(config, DETRConfig)
    assert (config.masks, config.logits) == (masks, 250 if masks else 91)
    assert (config.encoder_layers, config.decoder_layers, config.queries, config.hidden) == (6, 6, 100, 2048)
    assert converted["classes.index"].tolist() == list(categories.ids)
    with torch.device("meta"):
        model = config.build(categories)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in converted.items()}
    if masks:
        assert sum(p.numel() for p in model.parameters()) == 42_899_288


def test_every_key_is_accounted_for(shared) -> None:
    state = published(shared, "detr_panoptic_transformers")
    with pytest.raises(ValueError, match=r"mask_head\.conv3\.conv\.weight"):
        convert({**state, "mask_head.conv3.conv.weight": torch.zeros(1)}, "transformers", FEW)
    lacking = {k: v for k, v in state.items() if k != "detr.model.decoder.layers.3.encoder_attn.k_proj.bias"}
    with pytest.raises(ValueError, match=r"decoder\.layers\.3\.encoder_attn\.q_proj\.bias"):
        convert(lacking, "transformers", FEW)
    state = published(shared, "detr_panoptic_original")
    with pytest.raises(ValueError, match=r"detr\.transformer\.encoder\.layers\.0\.linear3\.bias"):
        convert({**state, "detr.transformer.encoder.layers.0.linear3.bias": torch.zeros(1)}, "detr", FEW)
    lacking = {k: v for k, v in state.items() if k != "mask_head.gn4.bias"}
    with pytest.raises(ValueError, match=r"missing .*mask_head\.norms\.3\.bias"):
        convert(lacking, "detr", FEW)


def test_a_category_without_a_logit_is_named(shared) -> None:
    beyond = Categories(FEW.names, FEW.is_thing, (1, 17, 250, 187), FEW.colours)
    with pytest.raises(ValueError, match=r"250 logits.*none for 250 \(grass\)"):
        convert(published(shared, "detr_panoptic_original"), "detr", beyond)


def batch(seeds: tuple[int, ...], categories: Categories):
    """Drawn images of two sizes with their truth."""
    samples = []
    for seed, (height, width) in zip(seeds, ((64, 96), (50, 70)), strict=True):
        rng = np.random.default_rng(seed)
        truth = draw_segmentation(rng, height, width, categories)
        samples.append(Sample(rng.integers(0, 256, (height, width, 3), np.uint8), truth, str(seed)))
    return collate(samples)


@pytest.fixture(scope="module", params=["resnet", "timm"])
def theirs(request):
    """Hugging Face's panoptic DETR with random weights, small but for its backbone, with its own ResNet and timm's."""
    transformers = pytest.importorskip("transformers")
    if request.param == "timm":
        backbone = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=[1, 2, 3, 4])
    else:
        names = ["stage1", "stage2", "stage3", "stage4"]
        backbone = transformers.ResNetConfig(
            depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", out_features=names
        )
    sizes = dict(d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=9)
    config = transformers.DetrConfig(
        swin_config=backbone, use_pretrained_backbone=False, num_labels=250, auxiliary_loss=False, **sizes
    )
    torch.manual_seed(0)
    model = transformers.DetrForSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.xavier_normal_(parameter)
    return model


def test_transformers_outputs_and_losses(theirs) -> None:
    config, weights = convert(theirs.state_dict(), "transformers", FEW)
    ours = config.build(FEW).eval()
    ours.load_state_dict(weights)
    images, targets = batch((1, 2), FEW)
    pixels = ours.pixels(images, targets.frame)
    labels = []
    for b in range(2):
        count = int((targets.labels[b] >= 0).sum())
        masks = targets.segments[b] == torch.arange(1, count + 1)[:, None, None]
        boxes = [boxes_of(mask, targets.frame.sizes[b]) for mask in masks]
        classes = torch.tensor([FEW.ids[k] for k in targets.labels[b, :count]])
        labels.append({"class_labels": classes, "boxes": torch.stack(boxes), "masks": masks.float()})
    with torch.no_grad():
        reference = theirs(pixels, pixel_mask=targets.frame.valid().long(), labels=labels)
        outputs = ours.network(images, targets.frame)
        losses = ours.loss({k: v for k, v in outputs.items() if "auxiliary" not in k}, targets)
        masks = ours.masks(outputs, targets.frame)
    torch.testing.assert_close(outputs["logits"], reference.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs["boxes"], reference.pred_boxes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(masks, reference.pred_masks, atol=1e-4, rtol=1e-4)
    names = {"class": "loss_ce", "box": "loss_bbox", "giou": "loss_giou", "mask": "loss_mask", "dice": "loss_dice"}
    factors = {"box": 5, "giou": 2}
    assert losses.keys() == names.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(factors.get(name, 1) * reference.loss_dict[names[name]].item(), rel=1e-4)


def boxes_of(mask: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """float [4], the published box of a mask, as shares of an image of that height and width."""
    rows, columns = mask.nonzero().unbind(1)
    (y0, y1), (x0, x1) = ((side.min(), side.max()) for side in (rows, columns))
    box = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0])
    return box / size.flip(0).repeat(2)


def test_unused_logits_compete_but_never_appear(shared) -> None:
    config = DETRConfig(**SMALL, logits=250)
    model = config.build(FEW).eval()
    model.classes.index.copy_(torch.tensor(FEW.ids))
    images, targets = batch((3, 4), FEW)
    outputs = dict(model.network(images, targets.frame))
    logits = torch.full_like(outputs["logits"], -9.0)
    logits[:, 0, 17], logits[:, 1, 44], logits[:, 2, 250] = 9.0, 9.0, 9.0
    outputs["logits"] = logits.requires_grad_()
    assert [merged.labels.tolist() for merged in model.postprocess(outputs, targets.frame).maps] == [[1], [1]]
    assert all(44 not in scored.labels for scored in model.postprocess(outputs, targets.frame, ["instances"]).instances)
    model.loss(outputs, targets)["class"].backward()
    assert (logits.grad[..., 44] > 0).any() and not (logits.grad[..., 44] < 0).any()


SMALL = dict(
    backbone=Backbone("resnet18", norm="frozen"),
    channels=32,
    heads=4,
    hidden=32,
    encoder_layers=1,
    decoder_layers=1,
    queries=10,
    mask_channels=32,
)


def saved(config: DETRConfig, categories: Categories) -> dict:
    """The checkpoint of a fresh model."""
    torch.manual_seed(1)
    file = io.BytesIO()
    save(file, config=config, model=config.build(categories))
    file.seek(0)
    return load(file)


def test_finetuning_leaves_only_the_class_layer_fresh(small_categories) -> None:
    """From the published logits to a head of ours, and to one with hidden units."""
    record = saved(DETRConfig(**SMALL, logits=250), FEW)
    for hidden, layers in (((), 1), ((16, 8), 3)):
        torch.manual_seed(2)
        model = DETRConfig(**SMALL, class_hidden=hidden).build(small_categories)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        loaded = load_for_finetune(model, record)
        fresh = loaded.fresh
        expected = [f"class_head.layers.{i}.{leaf}" for i in range(layers) for leaf in ("bias", "weight")]
        assert fresh == (*expected, "classes.index")
        # "person" and "sky" are classes of both; nothing of them is worth keeping below hidden layers that are fresh
        assert loaded.classes == (() if hidden else ("person", "sky"))
        for key, value in model.state_dict().items():
            if not (loaded.classes and key.startswith("class_head.")):
                assert torch.equal(value, before[key] if key in fresh else record["weights"][key]), key
        if loaded.classes:
            head, theirs = model.class_head.layers[0].weight, record["weights"]["class_head.layers.0.weight"]
            logits = record["weights"]["classes.index"].tolist()
            assert torch.equal(head[0], theirs[logits[0]]) and torch.equal(head[1], theirs[logits[3]])
            assert torch.equal(head[-1], theirs[-1])
            assert torch.equal(head[2:-1], before["class_head.layers.0.weight"][2:-1])


def test_the_mask_head_is_trained_in_a_second_stage() -> None:
    record = saved(DETRConfig(**SMALL, masks=False), FEW)
    model = DETRConfig(**SMALL).build(FEW)
    fresh = load_for_finetune(model, record).fresh
    assert fresh and {key.split(".")[0] for key in fresh} == {"mask_attention", "mask_head"}
    assert torch.equal(model.box_head.layers[0].weight, record["weights"]["box_head.layers.0.weight"])
    with pytest.raises(ValueError, match=r"unexpected: mask_attention"):
        load_for_finetune(DETRConfig(**SMALL, masks=False).build(FEW), saved(DETRConfig(**SMALL), FEW))


def test_the_logit_of_a_category() -> None:
    """Its id where the logits are ids, in whatever order they are listed, else its place in the list."""

    def of(*ids: int) -> Categories:
        return Categories.from_coco([{"id": i, "name": f"class {i}", "isthing": i % 2} for i in ids])

    assert class_index(3, of(2, 0, 1)).tolist() == list(of(2, 0, 1).ids)
    assert class_index(3, of(5, 7, 9)).tolist() == [0, 1, 2]
    assert class_index(10, of(5, 7, 9)).tolist() == [5, 7, 9]
    with pytest.raises(ValueError, match=r"none for .*12 \(class 12\)"):
        class_index(10, of(5, 12))
