"""DETR with its panoptic head (Carion et al., "End-to-End Object Detection with Transformers", arXiv 2005.12872).

A fixed set of learned queries asks a transformer's memory of the image, and each answers with a class and a
box, or with "no object"; matching answers and segments one to one leaves nothing to suppress afterwards. Stuff
has boxes like things. A second head turns where each query looks into its mask.

The network follows facebookresearch/detr, oddities included: the attention maps of the mask head share one
softmax over all heads and cells; its first input is the projected backbone, not the memory; a segment's box ends
at its last pixel, not after it; crowds are targets; pixels of batch padding count as background in mask losses;
merged duplicates of stuff give their pixels back (see `postprocess.py`).

Deviations: the mask head runs where its result is used, in `loss` for the matched queries and in `postprocess` for
those that are merged or scored, not for all of them. Its first convolution is split into what depends on the
image and what depends on the query. Boxes of the truth are those of the map after the crop, and segments
without a pixel in it are no targets, one pixel wide ones are. Merging cuts batch padding off, where the
reference stretches the padded masks over the image. Its class and cardinality errors, which train nothing, are
not computed. Two-stage training is `masks=False`, then `train.freeze` on everything but the mask head; frozen
parts keep their dropout, as in the reference. Without masks, `postprocess` paints boxes.

Shapes: B images, Q queries, C classes, K + 1 logits, L decoder layers, D width, H x W canvas, h x w of res5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.layers.attention import MLP, AttentionMap, Decoder, Encoder, LearnedPositions, sine_positions
from panoptic.layers.image import ImageNormalisation
from panoptic.models.base import CERTAIN, Outputs, PanopticModel, Prediction, Row, Wanted
from panoptic.models.detr.class_space import ClassSpace
from panoptic.models.detr.config import DETRConfig
from panoptic.models.detr.loss import LossWeights, match, set_prediction_loss
from panoptic.models.detr.mask_head import MaskHead
from panoptic.models.detr.postprocess import postprocess
from panoptic.models.detr.targets import box_targets
from panoptic.segmentation import Categories, Frame, Targets

CHUNK = 16
"""Queries whose masks are computed at once outside of training."""

LEVELS = ("res4", "res3", "res2")
"""The features that the mask head adds on its way up."""


class DETR(PanopticModel):
    """Backbone, encoder, decoder, heads of class and box, mask head.

    Outputs: "logits" [B, Q, K + 1] ("no object" last), "boxes" [B, Q, 4] (centre x, centre y, width, height, as
    shares of the image without padding), the same of earlier layers as "auxiliary_logits" and "auxiliary_boxes"
    [L - 1, B, Q, ...]; and what the mask head needs: "states" [B, Q, D], "memory" [B, D, h, w] and "levels_0" to
    "levels_3". `postprocess` also takes "masks" [B, Q, ...], logits over the canvas at any resolution, in place of
    the mask head's.
    """

    class_modules = ("class_head", "classes")
    added_modules = ("mask_attention", "mask_head")

    def __init__(self, config: DETRConfig, categories: Categories) -> None:
        super().__init__()
        self.config, self.categories, self.divisor = config, categories, config.divisor
        width = config.channels
        self.pixels = ImageNormalisation(config.pixel_mean, config.pixel_std)
        self.levels = (*LEVELS, "res5") if config.masks else ("res5",)
        self.backbone = config.backbone.build(self.levels)
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

    def class_rows(self, weights: Mapping[str, Tensor]) -> dict[str, list[Row]]:
        """The logits, of which a published head has more than classes; none below hidden layers, which start fresh."""
        if self.config.class_hidden:
            return {}
        rows: list[Row] = [(f"unused {k}", 0) for k in range(self.classes.logits)]
        for label, logit in enumerate(weights["classes.index"].tolist()):
            rows[logit] = (label, 0)
        return {"class_head.layers.0": [*rows, ("nothing", 0)]}

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 images [B, 3, H, W] to the outputs that the class describes."""
        return self.forward_normalised(self.normalised(images, frame), frame)

    def forward_normalised(self, pixels: Tensor, frame: Frame | None = None) -> Outputs:
        """The network on normalised pixels, float [B, 3, H, W]."""
        features = self.features(pixels)
        source = self.projection(features["res5"])
        size = source.shape[-2:]
        valid = valid_cells(frame, size, source.device)
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
        """Terms "class", "box", "giou", "mask" and "dice"; those of earlier layers as "class_0", ..."""
        masks = None if self.mask_head is None else partial(self._masks_of_head, outputs, targets.frame)
        return set_prediction_loss(outputs, targets, self.classes, self.loss_weights, masks)

    @torch.no_grad()
    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Maps, instances and class maps; the mask head runs once an image, for the queries that anything needs."""
        has_masks = self.mask_head is not None or "masks" in outputs
        return postprocess(
            outputs,
            frame,
            want,
            classes=self.classes,
            categories=self.categories,
            query_masks=partial(self.query_masks, outputs, frame) if has_masks else None,
            threshold=self.config.threshold,
            min_area=self.config.min_area,
            mask_threshold=self.config.mask_threshold,
        )

    @torch.no_grad()
    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The outputs "logits", "boxes" and "masks" (int8, at canvas resolution) of queries that match the truth.

        With more segments than queries, those that no query matches stay away.
        """
        true = box_targets(targets)
        logits, boxes = torch.zeros_like(outputs["logits"]), outputs["boxes"].clone()
        matches = match(outputs["logits"], boxes, targets, true, self.classes, self.loss_weights)
        image, query, entry = matches.groups, matches.queries, matches.targets
        chosen = torch.full(logits.shape[:2], self.classes.logits, device=logits.device)
        chosen[image, query] = self.classes.to_logits(targets.labels)[image, entry]
        boxes[image, query] = true.boxes[image, entry]
        masks = torch.full((*logits.shape[:2], *targets.frame.canvas), -1, dtype=torch.int8, device=logits.device)
        for b, q, k in zip(image.tolist(), query.tolist(), entry.tolist(), strict=True):
            masks[b, q][targets.segments[b] == k + 1] = 1
        return {"logits": logits.scatter_(2, chosen[:, :, None], CERTAIN), "boxes": boxes, "masks": masks}

    @property
    def loss_weights(self) -> LossWeights:
        """The factors of loss and matching cost."""
        config = self.config
        return LossWeights(
            classes=config.class_weight,
            boxes=config.box_weight,
            giou=config.giou_weight,
            masks=config.mask_weight,
            dice=config.dice_weight,
            no_object=config.no_object_weight,
        )

    def query_masks(self, outputs: Outputs, frame: Frame, image: int, queries: Tensor) -> Tensor:
        """The mask logits [n, h, w] over the canvas of some queries, int64 [n], a few at a time: no gradient needed."""
        if "masks" in outputs:
            return outputs["masks"][image, queries]
        parts = [self._masks_of_head(outputs, frame, image, part) for part in queries.split(CHUNK) if len(part)]
        return torch.cat(parts) if parts else outputs["memory"].new_zeros(0, 1, 1)

    def _masks_of_head(self, outputs: Outputs, frame: Frame, image: int, queries: Tensor) -> Tensor:
        """The mask head's logits [n, H / 4, W / 4] of some queries, int64 [n], all at once."""
        assert self.mask_attention is not None and self.mask_head is not None
        memory = outputs["memory"][image : image + 1]
        valid = valid_cells(frame, memory.shape[-2:], memory.device)
        inside = None if valid is None else valid[image : image + 1]
        attention = self.mask_attention(outputs["states"][image : image + 1, queries], memory, inside)[0]
        return self.mask_head(attention, [outputs[f"levels_{i}"][image : image + 1] for i in range(4)])


def valid_cells(frame: Frame | None, size: tuple[int, int] | torch.Size, device: torch.device | str) -> Tensor | None:
    """The cells of a feature map that begin inside the image, bool [B, h, w]; None, all of them, without a frame."""
    if frame is None:
        return None
    inside = frame.valid(device)[:, None].float()
    return F.interpolate(inside, size=tuple(size), mode="nearest")[:, 0] > 0
