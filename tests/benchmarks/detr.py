"""DETR's panoptic post-processor against the original (row 7b), and a whole image against Hugging Face's (row detr)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from panoptic.convert import convert
from panoptic.models.detr.model import DETRConfig
from panoptic.models.detr.postprocess import merge_masks
from panoptic.segmentation import Categories, Frame, Segmentation
from tests.benchmarks import inputs, peers
from tests.benchmarks.timing import Case, close, same_partition

QUERIES, KEPT, LOGITS = 100, 28, 250

THRESHOLD = 0.85

TIES = 0.001
"""Share of pixels that rounding may send to the other one of two masks that are equally high."""


def cases(names: Sequence[str], scale: float, peers_folder: Path | None) -> list[Case]:
    """The cases among 7b and detr that are wanted, with sides multiplied by `scale`."""
    found = [_merging(scale, peers_folder)] if "7b" in names else []
    return [*found, _image(scale)] if "detr" in names else found


def _merging(scale: float, peers_folder: Path | None) -> Case:
    height, width = (max(48, round(side * scale)) for side in (800, 1333))
    categories = inputs.categories(80, 53)
    logits, masks, kept = _answers((-(-height // 4), -(-width // 4)), categories)
    module = peers.detr(peers_folder)
    classes = logits[kept].argmax(1) - 1
    scores = logits[kept].softmax(1).amax(1)
    size = (height, width)

    def ours(_: int) -> Segmentation:
        kept = torch.nonzero((logits.argmax(1) < LOGITS) & (logits.softmax(1).amax(1) > THRESHOLD))[:, 0]
        return merge_masks(masks[kept], classes, scores, categories, canvas=size, size=size, output_size=size)

    def theirs(_: int) -> dict[str, Any]:
        assert module is not None
        things = {identifier: thing for identifier, thing in zip(categories.ids, categories.is_thing, strict=True)}
        outputs = {"pred_logits": logits[None], "pred_masks": masks[None], "pred_boxes": torch.rand(1, QUERIES, 4)}
        return module.PostProcessPanoptic(things, THRESHOLD)(outputs, [size])[0]

    def compare(mine: Segmentation, other: dict[str, Any]) -> None:
        image = cv2.imdecode(np.frombuffer(other["png_string"], np.uint8), cv2.IMREAD_COLOR)
        assert image is not None
        same_partition(mine.segments, image[:, :, ::-1].astype(int) @ [1, 256, 65536], TIES, "segments")
        close([categories.ids[k] for k in mine.labels], [row["category_id"] for row in other["segments_info"]], "class")

    work = f"DETR panoptic post-processing, {width}x{height}, {KEPT} of {QUERIES} queries kept"
    found = module is not None
    return Case("7b", work, ours, {"detr": theirs} if found else {}, {"detr": compare} if found else {})


def _answers(size: tuple[int, int], categories: Categories) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [Q, K + 1] of which `KEPT` are certain of a class, masks [Q, *size] with the contours of segments, and
    the certain queries."""
    rng = np.random.default_rng(2)
    truth = inputs.draw_truth(rng, size, 20, 8, categories)
    torch.manual_seed(2)
    kept = torch.randperm(QUERIES)[:KEPT].sort().values
    logits = torch.full((QUERIES, LOGITS + 1), -9.0)
    masks = functional.interpolate(torch.randn(1, QUERIES, 9, 12), size=size, mode="bilinear")[0]
    for k, query in enumerate(kept.tolist()):
        entry = k % len(truth.labels)
        logits[query, categories.ids[int(truth.labels[entry])]] = 9.0
        masks[query] += torch.from_numpy(cv2.GaussianBlur(8.0 * (truth.segments == entry + 1), (5, 5), 1.0)).float()
    rest = torch.ones(QUERIES, dtype=torch.bool).index_fill(0, kept, False)
    logits[rest, LOGITS] = 9.0
    return logits, masks, kept


def _image(scale: float) -> Case:
    """Forward pass and merge, ResNet-50, with the same certain queries; the peer's rule for merging is its own."""
    height, width = (max(64, round(side * scale)) for side in (480, 640))
    categories = inputs.categories(80, 53)
    module = peers.transformers()
    logits, _, _ = _answers((height // 4, width // 4), categories)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    frame, peer, model = Frame.full(images), None, DETRConfig(logits=LOGITS).build(categories)
    if module is not None:
        peer = _hugging_face(module)
        config, weights = convert(peer.state_dict(), "transformers", categories)
        model = config.build(categories)
        model.load_state_dict(weights)
    model.eval()

    @torch.inference_mode()
    def ours(_: int) -> dict[str, Tensor]:
        outputs = model.network(images, frame)
        model.postprocess({**outputs, "logits": logits[None]}, frame)
        return outputs

    @torch.inference_mode()
    def theirs(_: int) -> Any:
        assert module is not None and peer is not None
        answer = peer(pixel_values=model.pixels(images), pixel_mask=torch.ones(1, height, width, dtype=torch.long))
        outputs, answer.logits = (answer.logits, answer.pred_boxes), logits[None]
        module.DetrImageProcessor().post_process_panoptic_segmentation(
            answer, threshold=THRESHOLD, label_ids_to_fuse=set(), target_sizes=[(height, width)]
        )
        return outputs

    def compare(mine: dict[str, Tensor], other: tuple[Tensor, Tensor]) -> None:
        close(mine["logits"], other[0], "logits")
        close(mine["boxes"], other[1], "boxes")

    work = f"DETR-R50 panoptic, forward and merge, {width}x{height}, {KEPT} queries kept"
    name = "Hugging Face"
    return Case("detr", work, ours, {name: theirs} if module else {}, {name: compare} if module else {})


def _hugging_face(module: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    backbone = module.TimmBackboneConfig(backbone="resnet50", out_indices=[1, 2, 3, 4])
    config = module.DetrConfig(swin_config=backbone, use_pretrained_backbone=False, num_labels=LOGITS)
    return module.DetrForSegmentation(config).eval()
