"""DETR with its panoptic head (Carion et al., "End-to-End Object Detection with Transformers", arXiv 2005.12872).

A fixed set of learned queries asks a transformer's memory of the image, and each answers with a class and a
box, or with "no object"; matching answers and segments one to one leaves nothing to suppress afterwards. Stuff
has boxes like things. A second head turns where each query looks into its mask.

The network follows facebookresearch/detr, oddities included: the attention maps of the mask head share one
softmax over all heads and cells; its first input is the projected backbone, not the memory; a segment's box ends
at its last pixel, not after it; crowds are targets; pixels of batch padding count as background in mask losses;
merged duplicates of stuff give their pixels back (see `merging.detr`).

Deviations: the mask head runs where its result is used, in `loss` for the matched queries and in `segment` for
the kept ones, not for all of them (`masks` gives all). Its first convolution is split into what depends on the
image and what depends on the query. Boxes of the truth are those of the map after the crop, and segments
without a pixel in it are no targets, one pixel wide ones are. Merging cuts batch padding off, where the
reference stretches the padded masks over the image. Its class and cardinality errors, which train nothing, are
not computed. Two-stage training is `masks=False`, then `train.freeze` on everything but the mask head; frozen
parts keep their dropout, as in the reference. Without masks, `segment` paints boxes.

Shapes: B images, Q queries, C classes, K + 1 logits, L decoder layers, D width, H x W canvas, h x w of res5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from panoptic import losses
from panoptic.backbones import Backbone
from panoptic.distributed import world_mean
from panoptic.layers.attention import MLP, AttentionMap, Decoder, Encoder, LearnedPositions, sine_positions
from panoptic.layers.image import ImageNormalisation
from panoptic.matcher import Matches, class_cost, hungarian
from panoptic.models.base import Outputs, PanopticModel
from panoptic.models.detr.class_space import ClassSpace
from panoptic.models.detr.mask_head import MaskHead
from panoptic.models.detr.postprocess import binary_masks, box_masks, encode, merge_boxes, merge_masks
from panoptic.segmentation import IGNORE, Categories, Frame, Instances, Segmentation, Targets
from panoptic.targets.instances import boxes as segment_boxes

CHUNK = 16
"""Queries whose masks are computed at once outside of training."""

PIXELS = 1 << 24
"""Mask pixels compared at once in the loss; with more, they are computed again for the gradient."""

CERTAIN = 30.0
"""The logit of a true class in `truth`."""

LEVELS = ("res4", "res3", "res2")
"""What the mask head adds on its way up."""


@dataclass(frozen=True)
class DETRConfig:
    """DETR: detection alone or with masks, any depth and width."""

    backbone: Backbone = field(default_factory=lambda: Backbone(norm="frozen", freeze=2))
    """Where the features come from (DC5: output_stride 16)."""
    divisor: int = 1
    """Batches are padded to a multiple of this."""
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from the pixels, scale 0..255."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divides the pixels, scale 0..255."""
    channels: int = 256
    """Width of the transformer, a multiple of 4 and of the heads."""
    heads: int = 8
    """Attention heads."""
    hidden: int = 2048
    """Width of the feed-forward networks."""
    encoder_layers: int = 6
    """Layers that let the image's cells look at each other."""
    decoder_layers: int = 6
    """Layers that let the queries look at the image."""
    queries: int = 100
    """The most segments that an image can get; of more in the truth the rest is not learnt."""
    dropout: float = 0.1
    """In the transformer, attention included."""
    pre_norm: bool = False
    """Normalise before attention and feed-forward network instead of after."""
    positions: Literal["sine", "learned"] = "sine"
    """Of the image's cells; learned ones know 50 rows and columns."""
    masks: bool = True
    """The panoptic head; without it the model finds boxes (first stage) and `segment` paints them."""
    mask_channels: int = 256
    """Width of the mask head after its first convolution, halved at each finer level."""
    unit_mean_attention: bool = False
    """Maps of where a query looks have the mean 1 in the mask head, not the sum (published): for short trainings."""
    logits: int = 0
    """Logits without "no object"; 0 = one a class. Published: 250 for COCO's panoptic, 91 for its detection ids."""
    class_hidden: tuple[int, ...] = ()
    """Hidden units of the classification head; published: none, a linear layer."""
    class_dropout: float = 0.0
    """After each of them."""
    auxiliary: bool = True
    """Losses of classes and boxes after every decoder layer, not only the last."""
    class_weight: float = 1.0
    """Factor of the cross-entropy, and of the probability in the matching cost."""
    box_weight: float = 5.0
    """Factor of the L1 distance of boxes, in loss and cost."""
    giou_weight: float = 2.0
    """Factor of the generalised IoU, in loss and cost."""
    mask_weight: float = 1.0
    """Factor of the focal loss of masks."""
    dice_weight: float = 1.0
    """Factor of the dice loss of masks."""
    no_object_weight: float = 0.1
    """Of queries without a segment, in the cross-entropy."""
    threshold: float = 0.85
    """Queries merge whose class is more probable."""
    min_area: int = 4
    """Merged segments of so many pixels or fewer are removed."""
    mask_threshold: float = 0.5
    """Probability above which a pixel belongs to an instance; for AP."""

    def build(self, categories: Categories) -> DETR:
        """The model, initialised from scratch but for what `backbone.weights` says of timm.

        Raises:
            ValueError: options contradict each other; the message names them.
        """
        if self.channels % 4 or self.channels % self.heads:
            raise ValueError(f"channels: {self.channels} is no multiple of 4 and of heads ({self.heads})")
        if self.masks and self.mask_channels % 32:
            raise ValueError(f"mask_channels: {self.mask_channels} is no multiple of 32; it is halved four times")
        if min(self.queries, self.decoder_layers) < 1:
            raise ValueError("queries and decoder_layers: at least 1 of each")
        return DETR(self, categories)


class DETR(PanopticModel):
    """Trunk, encoder, decoder, heads of class and box, mask head.

    Outputs: "logits" [B, Q, K + 1] ("no object" last), "boxes" [B, Q, 4] (centre x, centre y, width, height, as
    shares of the image without padding), the same of earlier layers as "auxiliary_logits" and "auxiliary_boxes"
    [L - 1, B, Q, ...]; and what the mask head needs: "states" [B, Q, D], "memory" [B, D, h, w] and "levels_0" to
    "levels_3". `segment` also takes "masks" [B, Q, ...], logits over the canvas at any resolution, in place of
    the mask head's.
    """

    class_modules = ("class_head", "classes")
    added_modules = ("mask_attention", "mask_head")

    def __init__(self, config: DETRConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        width = config.channels
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std)
        self.backbone = config.backbone.build()
        channels = self.backbone.channels
        self.positions = LearnedPositions(width) if config.positions == "learned" else None
        self.projection = nn.Conv2d(channels["res5"], width, 1)
        shape = (width, config.heads, config.hidden)
        self.encoder = Encoder(*shape, config.encoder_layers, config.dropout, config.pre_norm)
        self.decoder = Decoder(*shape, config.decoder_layers, config.dropout, config.pre_norm)
        self.queries = nn.Embedding(config.queries, width)
        self.classes = ClassSpace(len(categories), config.logits)
        self.class_head = MLP((width, *config.class_hidden, self.classes.logits + 1), config.class_dropout)
        self.box_head = MLP((width, width, width, 4))
        self.mask_attention = self.mask_head = None
        if config.masks:
            self.mask_attention = AttentionMap(width, config.heads, config.unit_mean_attention)
            fine = [channels[name] for name in LEVELS]
            self.mask_head = MaskHead(width, config.heads, config.mask_channels, fine)

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 [B, 3, H, W] to the outputs that the class describes."""
        return self.answer(self.pixels(images, frame), frame)

    def answer(self, pixels: Tensor, frame: Frame | None = None) -> Outputs:
        """`network` of normalised pixels, float [B, 3, H, W]."""
        features = self.backbone(pixels)
        source = self.projection(features["res5"])
        size = source.shape[-2:]
        valid = _valid(frame, size, source.device)
        mask = None if valid is None else valid.flatten(1)[:, None, None]
        if valid is None:
            valid = torch.ones(1, *size, dtype=torch.bool, device=source.device)
        positions = sine_positions(valid, self.config.channels) if self.positions is None else self.positions(valid)
        positions = positions.flatten(2).transpose(1, 2)
        memory = self.encoder(source.flatten(2).transpose(1, 2), positions, mask)
        states = self.decoder(self.queries.weight, memory, positions, mask)
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 would round boxes to 1/256 of the image
            logits, boxes = self.class_head(states.float()), self.box_head(states.float()).sigmoid()
        outputs = {"logits": logits[-1], "boxes": boxes[-1]}
        if self.config.auxiliary:
            outputs |= {"auxiliary_logits": logits[:-1], "auxiliary_boxes": boxes[:-1]}
        if self.mask_head is not None:
            outputs |= {"states": states[-1], "memory": memory.transpose(1, 2).unflatten(2, size)}
            levels = self.mask_head.levels(source, [features[name] for name in LEVELS])
            outputs |= {f"levels_{i}": level for i, level in enumerate(levels)}
        return outputs

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """Terms "class", "box", "giou", "mask" and "dice"; those of earlier layers as "class_0", ...

        Raises:
            FloatingPointError: outputs that are not finite; names the images.
        """
        images = len(targets.labels)
        present, boxes = _true_boxes(targets)
        logits, predicted = self._layers(outputs)
        matches = self._match(logits, predicted, targets, present, boxes)
        count = world_mean(present.sum().float()).clamp(min=1)
        layers = len(logits) // images
        image, layer = matches.groups % images, matches.groups // images
        wanted = torch.full(logits.shape[:2], self.classes.logits, device=logits.device)
        wanted[matches.groups, matches.queries] = self.classes.to_logits(targets.labels)[image, matches.targets]
        found, truth = predicted[matches.groups, matches.queries], boxes[image, matches.targets]
        distance = (found - truth).abs().sum(1)
        apart = 1 - losses.generalised_iou(losses.box_corners(found), losses.box_corners(truth))
        flat = logits.view(layers, -1, logits.shape[-1])
        class_terms = losses.query_cross_entropy(flat, wanted.view(layers, -1), self.config.no_object_weight)
        box_terms, giou_terms = (
            values.new_zeros(layers).index_add(0, layer, values) / count for values in (distance, apart)
        )
        terms: dict[str, Tensor] = {}
        for i in (layers - 1, *range(layers - 1)):
            suffix = "" if i == layers - 1 else f"_{i}"
            terms[f"class{suffix}"] = self.config.class_weight * class_terms[i]
            terms[f"box{suffix}"] = self.config.box_weight * box_terms[i]
            terms[f"giou{suffix}"] = self.config.giou_weight * giou_terms[i]
        if self.mask_head is not None:
            focal, dice = self._mask_losses(outputs, targets, matches.of((layers - 1) * images, images))
            terms["mask"] = self.config.mask_weight * focal / count
            terms["dice"] = self.config.dice_weight * dice / count
        return terms

    @torch.no_grad()
    def segment(self, outputs: Outputs, frame: Frame) -> list[Segmentation]:
        """Merged maps at `frame.output_sizes`; the score of a segment is the probability of its class."""
        merged = []
        for b, (size, output_size) in enumerate(zip(frame.sizes.tolist(), frame.output_sizes.tolist(), strict=True)):
            scores, found = outputs["logits"][b].softmax(-1).max(-1)
            labels = self.classes.to_classes(found)
            kept = torch.nonzero((labels != IGNORE) & (scores > self.config.threshold))[:, 0]
            labels, scores = labels[kept], scores[kept]
            if self.mask_head is None and "masks" not in outputs:
                boxes = _scaled(outputs["boxes"][b, kept], output_size)
                merged.append(merge_boxes(boxes, labels, scores, self.categories, output_size))
                continue
            merged.append(
                merge_masks(
                    self._masks(outputs, frame, b, kept),
                    labels,
                    scores,
                    self.categories,
                    canvas=frame.canvas,
                    size=size,
                    output_size=output_size,
                    min_area=self.config.min_area,
                )
            )
        return merged

    @torch.no_grad()
    def instances(self, outputs: Outputs, frame: Frame, merged: list[Segmentation] | None = None) -> list[Instances]:
        """The queries whose most probable class is a thing, "no object" left aside; no other suppression."""
        found = []
        things = torch.tensor([*self.categories.is_thing, False], device=outputs["logits"].device)
        for b, (size, output_size) in enumerate(zip(frame.sizes.tolist(), frame.output_sizes.tolist(), strict=True)):
            scores, best = outputs["logits"][b].softmax(-1)[:, :-1].max(-1)
            labels = self.classes.to_classes(best)
            kept = torch.nonzero(things[labels])[:, 0]
            boxes, encoded = _scaled(outputs["boxes"][b, kept], output_size), []
            for part, outlines in zip(kept.split(CHUNK), boxes.split(CHUNK), strict=True):
                if not len(part):
                    continue
                if self.mask_head is None and "masks" not in outputs:
                    encoded += encode(box_masks(outlines, output_size))
                    continue
                masks = self._masks(outputs, frame, b, part)
                threshold = self.config.mask_threshold
                encoded += encode(binary_masks(masks, frame.canvas, size, output_size, threshold))
            numbers = (labels[kept].cpu().numpy(), scores[kept].float().cpu().numpy(), boxes.float().cpu().numpy())
            found.append(Instances(encoded, *numbers))
        return found

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """ "logits", "boxes" and "masks" (int8, at canvas resolution) of the queries that match the truth.

        With more segments than queries, those that no query matches stay away.
        """
        present, boxes = _true_boxes(targets)
        logits = torch.zeros_like(outputs["logits"])
        matches = self._match(outputs["logits"], outputs["boxes"], targets, present, boxes)
        image, query, entry = matches.groups, matches.queries, matches.targets
        wanted = torch.full(logits.shape[:2], self.classes.logits, device=logits.device)
        wanted[image, query] = self.classes.to_logits(targets.labels)[image, entry]
        found = outputs["boxes"].clone()
        found[image, query] = boxes[image, entry]
        masks = torch.full((*logits.shape[:2], *targets.frame.canvas), -1, dtype=torch.int8, device=logits.device)
        for b, q, k in zip(image.tolist(), query.tolist(), entry.tolist(), strict=True):
            masks[b, q][targets.segments[b] == k + 1] = 1
        return {"logits": logits.scatter_(2, wanted[:, :, None], CERTAIN), "boxes": found, "masks": masks}

    def masks(self, outputs: Outputs, frame: Frame) -> Tensor:
        """The mask logits of all queries, [B, Q, H / 4, W / 4], over the canvas."""
        every = torch.arange(self.config.queries, device=outputs["logits"].device)
        return torch.stack([self._masks(outputs, frame, b, every) for b in range(len(frame.sizes))])

    def _masks(self, outputs: Outputs, frame: Frame, b: int, queries: Tensor) -> Tensor:
        """[n, h, w] mask logits of some queries of image b, a few at a time."""
        if "masks" in outputs:
            return outputs["masks"][b, queries]
        parts = [self._tower(outputs, frame, b, part) for part in queries.split(CHUNK) if len(part)]
        return torch.cat(parts) if parts else outputs["memory"].new_zeros(0, 1, 1)

    def _tower(self, outputs: Outputs, frame: Frame, b: int, queries: Tensor) -> Tensor:
        assert self.mask_attention is not None and self.mask_head is not None
        memory = outputs["memory"][b : b + 1]
        valid = _valid(frame, memory.shape[-2:], memory.device)
        inside = None if valid is None else valid[b : b + 1]
        looks = self.mask_attention(outputs["states"][b : b + 1, queries], memory, inside)[0]
        return self.mask_head(looks, [outputs[f"levels_{i}"][b : b + 1] for i in range(4)])

    def _layers(self, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [L B, Q, K + 1] and boxes [L B, Q, 4] of all layers that are trained, the last one last."""
        if "auxiliary_logits" not in outputs:
            return outputs["logits"], outputs["boxes"]
        earlier = outputs["auxiliary_logits"].flatten(0, 1), outputs["auxiliary_boxes"].flatten(0, 1)
        return torch.cat([earlier[0], outputs["logits"]]), torch.cat([earlier[1], outputs["boxes"]])

    @torch.no_grad()
    def _match(self, logits: Tensor, predicted: Tensor, targets: Targets, present: Tensor, boxes: Tensor) -> Matches:
        """The cheapest pairs of each layer and image, by class and box; masks have no say."""
        config, repeats = self.config, len(logits) // len(targets.labels)
        classes = self.classes.to_logits(targets.labels).repeat(repeats, 1)
        boxes = boxes.repeat(repeats, 1, 1)
        cost = config.class_weight * class_cost(logits, classes)
        cost += config.box_weight * torch.cdist(predicted, boxes, p=1)
        cost -= config.giou_weight * losses.generalised_iou(
            losses.box_corners(predicted)[:, :, None], losses.box_corners(boxes)[:, None]
        )
        return hungarian(cost, present, targets.names)

    def _mask_losses(self, outputs: Outputs, targets: Targets, matches: Matches) -> tuple[Tensor, Tensor]:
        """Sums of focal and dice losses over the matched queries, at canvas resolution, padding included."""
        frame, weight = targets.frame, 1.0
        if not len(matches.queries):  # some mask, for nothing, so that every parameter has a gradient
            nothing = torch.zeros(1, dtype=torch.int64, device=matches.queries.device)
            matches, weight = Matches(nothing, nothing, nothing), 0.0
        parts = []
        for b in range(len(frame.sizes)):
            queries = matches.queries[matches.groups == b]
            if len(queries):
                parts.append(self._tower(outputs, frame, b, queries))
        logits = torch.cat(parts)
        step = max(1, PIXELS // math.prod(frame.canvas))
        sums = logits.new_zeros(2)
        for first in range(0, len(logits), step):
            part = slice(first, first + step)
            arguments = (logits[part], targets.segments, matches.groups[part], matches.targets[part])
            if len(logits) <= step:
                sums = sums + _compare(*arguments)
            else:
                sums = sums + checkpoint(_compare, *arguments, use_reentrant=False)
        return weight * sums[0], weight * sums[1]


def _compare(logits: Tensor, segments: Tensor, images: Tensor, entries: Tensor) -> Tensor:
    """float [2], the sums of focal and dice losses of masks [M, h, w] against segments `entries` of `images`."""
    masks = segments[images] == (entries + 1)[:, None, None]
    logits = functional.interpolate(logits[:, None].float(), size=masks.shape[1:], mode="bilinear", align_corners=False)
    focal, dice = losses.focal_and_dice(logits.flatten(1), masks.flatten(1))
    return torch.stack([focal.sum(), dice.sum()])


def _valid(frame: Frame | None, size: tuple[int, int] | torch.Size, device: torch.device) -> Tensor | None:
    """bool [B, h, w], the cells of a map that begin inside the image; None means all, without a frame."""
    if frame is None:
        return None
    inside = frame.valid(device)[:, None].float()
    return functional.interpolate(inside, size=tuple(size), mode="nearest")[:, 0] > 0


def _true_boxes(targets: Targets) -> tuple[Tensor, Tensor]:
    """bool [B, N], the segments with a pixel, and float32 [B, N, 4], their boxes as the model says them."""
    outlines = segment_boxes(targets)
    present = (targets.labels != IGNORE) & (outlines[:, :, 2] > outlines[:, :, 0])
    low, high = outlines[:, :, :2], outlines[:, :, 2:] - 1  # the last pixel, not the one after it
    boxes = torch.cat([(low + high) / 2, high - low], 2)
    sizes = targets.frame.sizes.to(boxes.device).flip(1).repeat(1, 2)
    return present, boxes / sizes[:, None]


def _scaled(boxes: Tensor, size: list[int]) -> Tensor:
    """[n, 4], shares of the image to x0 y0 x1 y1 in pixels of that size."""
    height, width = size
    return losses.box_corners(boxes) * boxes.new_tensor([width, height, width, height])
