"""MaskFormer and Mask2Former: merging (7a), a whole image (maskformer, mask2former), matching in a step (matching).

Hugging Face merges by a rule of its own (masks first come to 384x384), so its maps are compared loosely; the original's
must be the same but for rounding. Of a whole image the outputs of the networks must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from panoptic.backbones import Backbone
from panoptic.convert import convert
from panoptic.matcher import Matches, hungarian
from panoptic.models.base import Outputs
from panoptic.models.mask2former.model import Mask2FormerConfig
from panoptic.models.mask_transformer.loss import trained_layers
from panoptic.models.mask_transformer.mask_resampler import Extent
from panoptic.models.mask_transformer.masks import mask_products
from panoptic.models.mask_transformer.point_loss import matching_cost
from panoptic.models.mask_transformer.postprocess import postprocess_image
from panoptic.models.mask_transformer.targets import target_segments
from panoptic.models.maskformer.model import MaskFormerConfig
from panoptic.segmentation import Categories, Frame, Sample, Segmentation, collate
from panoptic.training.device import Engine, prepare
from panoptic.training.optim import Optim, build_optimiser
from panoptic.training.step import SkipCounter, train_step
from tests.benchmarks import inputs, peers
from tests.benchmarks.timing import Case, same_partition

QUERIES, KEPT, CLASSES = 100, 28, 133

TIES = 0.001
"""Share of pixels that rounding may send to the other one of two masks that are equally high."""

LOOSE = 0.1
"""Share of pixels that differ at most where masks went through 384x384."""

THRESHOLD = 0.8

MODELS = {"maskformer": "MaskFormer", "mask2former": "Mask2Former"}


def cases(names: Sequence[str], scale: float, peers_folder: Path | None) -> list[Case]:
    """The cases among 7a, maskformer, mask2former and matching that are wanted, with sides multiplied by `scale`."""
    found = [_merging(scale, peers_folder)] if "7a" in names else []
    found += [_image(name, scale) for name in MODELS if name in names]
    return [*found, _matching(scale)] if "matching" in names else found


def _merging(scale: float, peers_folder: Path | None) -> Case:
    height, width = (max(64, round(side * scale)) for side in (800, 1333))
    size = height, width  # without padding, which Hugging Face does not cut off
    categories = inputs.categories(80, 53)
    classes, masks = answers((-(-height // 4), -(-width // 4)), categories)
    extent = Extent(size, size, size)
    original, module = peers.mask2former(peers_folder), peers.transformers()
    runs: dict[str, Callable[[int], Any]] = {}
    checks: dict[str, Callable[[Any, Any], None]] = {}

    config = Mask2FormerConfig(threshold=THRESHOLD)

    def ours(_: int) -> Segmentation | None:
        return postprocess_image(classes, lambda queries: masks[queries], extent, ["maps"], categories, config).map

    if original is not None:
        merge = _of_class(original, categories)

        def theirs(_: int) -> Tensor:
            x = functional.interpolate(masks[None], size=size, mode="bilinear", align_corners=False)
            return merge(classes, x[0])[0]

        runs["Mask2Former"] = theirs
        checks["Mask2Former"] = lambda mine, other: same_partition(mine.segments, other.numpy(), TIES, "segments")
    if module is not None:
        answer = SimpleNamespace(class_queries_logits=classes[None], masks_queries_logits=masks[None])
        processor = module.Mask2FormerImageProcessor()

        def hugging_face(_: int) -> Tensor:
            return _post_processed(processor, answer, categories, size)

        runs["Hugging Face"] = hugging_face
        checks["Hugging Face"] = lambda mine, other: same_partition(mine.segments, other.numpy(), LOOSE, "segments")
    work = f"Mask2Former panoptic merge, {width}x{height}, {KEPT} of {QUERIES} queries kept"
    return Case("7a", work, ours, runs, checks)


def _of_class(merge: Callable[..., Any], categories: Categories) -> Callable[..., Any]:
    """The reference's method on a stand-in for its model."""
    metadata = SimpleNamespace(thing_dataset_id_to_contiguous_id={k: k for k in categories.things})
    head = SimpleNamespace(num_classes=len(categories))
    model = SimpleNamespace(
        sem_seg_head=head, metadata=metadata, object_mask_threshold=THRESHOLD, overlap_threshold=THRESHOLD
    )
    return lambda classes, masks: merge(model, classes, masks)


def _post_processed(processor: Any, answer: Any, categories: Categories, size: tuple[int, int]) -> Tensor:
    """Hugging Face's panoptic map with the published thresholds."""
    found = processor.post_process_panoptic_segmentation(
        answer,
        threshold=THRESHOLD,
        overlap_mask_area_threshold=THRESHOLD,
        label_ids_to_fuse=set(categories.stuff),
        target_sizes=[size],
    )
    return found[0]["segmentation"].int()


def answers(size: tuple[int, int], categories: Categories) -> tuple[Tensor, Tensor]:
    """Class logits [Q, K + 1] of which `KEPT` are certain, and masks [Q, *size] with the contours of segments."""
    rng = np.random.default_rng(2)
    truth = inputs.draw_truth(rng, size, KEPT - 8, 8, categories)
    torch.manual_seed(2)
    classes = torch.full((QUERIES, len(categories) + 1), -9.0)
    classes[:, -1] = 9.0
    masks = functional.interpolate(torch.randn(1, QUERIES, 9, 12), size=size, mode="bilinear")[0] - 9
    for k, query in enumerate(torch.randperm(QUERIES)[:KEPT].tolist()):
        entry = k % len(truth.labels)
        classes[query, -1], classes[query, int(truth.labels[entry])] = -9.0, 9.0
        inside = 16.0 * (truth.segments == entry + 1)
        masks[query] += torch.from_numpy(cv2.GaussianBlur(inside, (5, 5), 1.0)).float()
    return classes, masks


def _image(name: str, scale: float) -> Case:
    """Forward pass and merge, ResNet-50, with the same certain queries; ours in the memory format of our presets."""
    height, width = (max(64, round(side * scale / 32) * 32) for side in (480, 640))
    categories = inputs.categories(80, 53)
    module = peers.transformers()
    classes, _ = answers((height // 4, width // 4), categories)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    frame = Frame.full(images)
    peer = None if module is None else _hugging_face(name, module)
    model = prepare(_ours(name, peer, categories), "cpu", Engine(channels_last=True))
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def ours(_: int) -> Outputs:
        outputs = model.network(images)
        model.postprocess({**outputs, "classes": classes[None]}, frame)
        return outputs

    @torch.inference_mode()
    def theirs(_: int) -> Any:
        assert module is not None and peer is not None
        pixels: Any = model.pixels
        answer = peer(pixel_values=pixels(images).contiguous())
        found = answer.class_queries_logits, answer.masks_queries_logits
        answer.class_queries_logits = classes[None]
        processor = getattr(module, f"{MODELS[name]}ImageProcessor")()
        _post_processed(processor, answer, categories, (height, width))
        return found

    def compare(mine: Outputs, other: tuple[Tensor, Tensor]) -> None:
        masks = mask_products(mine["embeddings"], mine["features"])
        for what, a, b in (("classes", mine["classes"], other[0]), ("masks", masks, other[1])):
            if (worst := float((a - b).abs().max())) > 1e-3 * float(b.abs().max()):
                raise ValueError(f"{what}: differ by up to {worst:g}")

    work = f"{MODELS[name]}-R50, forward and merge, {width}x{height}, {KEPT} queries kept"
    peer_name = "Hugging Face"
    return Case(name, work, ours, {peer_name: theirs} if peer else {}, {peer_name: compare} if peer else {})


def _ours(name: str, peer: torch.nn.Module | None, categories: Categories) -> Any:
    """The model with the peer's weights, or its own where there is no peer."""
    if peer is None:
        torch.manual_seed(0)
        config = Mask2FormerConfig() if name == "mask2former" else MaskFormerConfig(encoder_layers=0)
        return config.build(categories).eval()
    config, weights = convert(peer.state_dict(), "transformers", categories)
    model = config.build(categories).eval()
    model.load_state_dict(weights)
    return model


def _hugging_face(name: str, module: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = module.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    if name == "mask2former":
        config = module.Mask2FormerConfig(swin_config=backbone, num_labels=CLASSES)
        return module.Mask2FormerForUniversalSegmentation(config).eval()
    decoder = module.DetrConfig(use_pretrained_backbone=False, num_queries=QUERIES)
    config = module.MaskFormerConfig(swin_config=backbone, decoder_config=decoder, num_labels=CLASSES)
    return module.MaskFormerForInstanceSegmentation(config).eval()


def _matching(scale: float) -> Case:
    """Costs at points and assignment of all ten predictions, beside the whole training step that they are part of."""
    side = max(64, round(512 * scale / 32) * 32)
    categories = inputs.categories(80, 53)
    rng = np.random.default_rng(4)
    truths = [inputs.draw_truth(rng, (side, side), 14, 7, categories) for _ in range(2)]
    images, targets = collate([Sample(inputs.draw_image(rng, truth), truth, str(k)) for k, truth in enumerate(truths)])
    torch.manual_seed(0)
    model = Mask2FormerConfig(backbone=Backbone(norm="frozen")).build(categories).train()
    with torch.no_grad():
        outputs = model.network(images)
    optim = Optim(optimiser="adamw", lr=1e-6)
    optimiser, chosen = build_optimiser(model, optim), target_segments(targets)
    layers = trained_layers(outputs)

    @torch.no_grad()
    def ours(_: int) -> list[Matches]:
        found = []
        for logits, vectors in zip(layers.classes.split(2), layers.embeddings.split(2), strict=True):
            masks = mask_products(vectors, outputs["features"])
            cost = matching_cost(logits, masks, targets, model.config, model.config.loss_points)
            found.append(hungarian(cost, chosen, targets.names))
        return found

    def step(_: int) -> float:
        batch = [(images, targets)]
        done = train_step(model, optimiser, batch, step=0, total=10, optim=optim, engine=Engine(), health=SkipCounter())
        return float(done.losses["total"])

    def compare(mine: list[Matches], loss: float) -> None:
        if any(len(matches.queries) != int(chosen.sum()) for matches in mine) or not np.isfinite(loss):
            raise ValueError("not every target was matched")

    work = f"Mask2Former-R50 matching, 2 images of {side}x{side}, 10 predictions, 12544 points"
    return Case("matching", work, ours, {"its training step": step}, {"its training step": compare})
