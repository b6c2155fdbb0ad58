"""EoMT (Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025, arXiv 2503.19108).

A plain ViT and nothing else: the queries join the tokens before its last blocks, and are classes and masks when they
come out. In training each of these blocks lets a query look only where the mask that it predicts so far says that it
is; the masks are trained away block by block, and the finished model needs none.

Follows tue-mps/eomt: matching, losses and merge are Mask2Former's; DINOv2's backbone with learned positions or DINOv3's
with rotary ones. Odd and kept: padding is black before normalisation, is attended to and learnt as background; the
backbone's final norm belongs to every prediction and never to the stream of tokens; a query's mask hides patches only,
never other queries, the class token or registers, so that an empty one needs no rescue; a block's masks are opened
query by query.

Validation in the course of a training, and every other evaluation, is without masks, so it measures the model that the
training ends with and is pessimistic until masks have been trained away (`training_note` says so in the log). The
reference validates with the masks of the moment. In evaluation there is one prediction, the last block's.

Deviations: predictions of earlier blocks are matched after the last block's, as in Mask2Former here, so that random
points come in another order than the reference's; a canvas other than `canvas` has its learned positions resampled at
each pass, where the reference refuses it; costs that are not finite are refused, where the reference takes the largest
number; boxes of instances are those of their masks (the reference has none).

Shapes: B images, Q queries, K classes, C channels (also those of masks), H x W canvas, h x w patches, P class token and
registers, N = Q + P + h w tokens, L blocks that hold queries.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones import Backbone, imagenet
from panoptic.backbones.build import ALWAYS
from panoptic.backbones.vit import ViT
from panoptic.backbones.weights import load_weights
from panoptic.layers.resize import resize
from panoptic.models.base import Outputs, Prediction, Wanted
from panoptic.models.eomt.annealing import Phases, certain, mask_probability, published_phases
from panoptic.models.eomt.config import EoMTConfig
from panoptic.models.mask_transformer.model import MaskTransformer
from panoptic.models.mask_transformer.point_loss import point_loss
from panoptic.segmentation import Categories, Frame, Targets


class EoMT(MaskTransformer):
    """The backbone, the queries and their two heads. Outputs are those of every `MaskTransformer`.

    In training mode there are L earlier predictions, each with features of its own.
    """

    config: EoMTConfig
    backbone: ViT
    step: Tensor

    def __init__(self, config: EoMTConfig, categories: Categories) -> None:
        _check(config)
        vit = _backbone(config)
        if config.query_blocks > vit.depth:
            raise ValueError(f"query_blocks {config.query_blocks}: the backbone has {vit.depth} blocks")
        super().__init__(config, categories, vit)
        vit.hold_tokens(config.queries, config.query_blocks)
        channels = vit.width
        self.queries = nn.Embedding(config.queries, channels)
        self.class_head = nn.Linear(channels, len(categories) + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(channels, channels),
            nn.GELU(),
            nn.Linear(channels, channels),
            nn.GELU(),
            nn.Linear(channels, channels),
        )
        doublings = max(1, config.patch.bit_length() - 3)  # to stride 4
        self.upscale = nn.Sequential(*(ScaleBlock(channels) for _ in range(doublings)))
        # the step, from which it follows how far masks are trained away; an integer, which no average of weights mixes
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self._phases: Phases = ()
        self._certain = (True,) * config.query_blocks

    def begin_step(self, step: int, total: int) -> None:
        """Take over how far masks of attention are trained away, a function of the two numbers alone."""
        self._phases = phases(self.config, total)
        self._certain = tuple(certain(step, *phase) for phase in self._phases)
        self.step.fill_(step)

    def training_note(self, total: int) -> str:
        """The phases of the masks, and that no validation sees them."""
        if not self.config.masked_attention:
            return ""
        found = phases(self.config, total)
        each = ", ".join(f"{start} to {end}" for start, end in found)
        return (
            f"masks of attention are trained away block by block, at steps {each}; validations are without masks from "
            f"the first on, so before step {max(end for _, end in found)} they say less than the model can"
        )

    def network(self, images: Tensor, frame: Frame | None = None) -> Outputs:
        """uint8 images [B, 3, H, W] to the outputs that the class describes."""
        if frame is not None:  # batch padding is black, as what augmentation pads
            images = images * frame.valid(images.device)[:, None]
        return self.forward_normalised(self.pixels(F.pad(images, _to_whole(images, self.config.patch))))

    def forward_normalised(self, pixels: Tensor) -> Outputs:
        """The network on normalised pixels, float [B, 3, H, W], sides multiples of the patch."""
        vit = self.backbone
        masked = self.training and self.config.masked_attention
        x, rope, grid = vit.embed(pixels)
        predictions: list[tuple[Tensor, Tensor, Tensor]] = []
        for index in range(vit.depth):
            block, mask = index - (vit.depth - self.config.query_blocks), None
            if block == 0:
                x = torch.cat([self.queries.weight.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
            if block >= 0 and masked:
                predictions.append(self._predict(x, grid))
                mask = self._attention_mask(block, predictions[-1], grid, x.shape[1])
            x = vit.block(index, x, rope, mask)
        classes, embeddings, features = self._predict(x, grid)
        outputs = {"classes": classes, "embeddings": embeddings, "features": features}
        if predictions:
            outputs["auxiliary_classes"] = torch.stack([prediction[0] for prediction in predictions])
            outputs["auxiliary_embeddings"] = torch.stack([prediction[1] for prediction in predictions])
            outputs |= {f"features_{block}": prediction[2] for block, prediction in enumerate(predictions)}
        return outputs

    def _predict(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits [B, Q, K + 1], embeddings [B, Q, C] and features [B, C, H / 4, W / 4] of tokens [B, N, C]."""
        x = self.backbone.normalise(x)
        queries = x[:, : self.config.queries]
        features = self.upscale(self.backbone.patches(x, grid))
        return self.class_head(queries), self.mask_head(queries), features

    @torch.no_grad()
    def _attention_mask(
        self, block: int, prediction: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int], tokens: int
    ) -> Tensor:
        """The tokens that each token may attend to, bool [B, 1, N, N]: a query at the patches inside of its mask.

        The masks are products with resized features instead of resized products, which are the same numbers to
        rounding: resizing is linear.
        """
        _, embeddings, features = prediction
        with torch.autocast(features.device.type, enabled=False):
            cells = resize(features.float(), grid, False).flatten(2)
            inside = embeddings.float() @ cells > 0  # [B, Q, h w]
        if not self._certain[block]:
            probability = mask_probability(self.step, *self._phases[block], self.config.anneal_power)
            opened = torch.rand(inside.shape[:2], device=inside.device) > probability
            inside = inside | opened[:, :, None]
        mask = torch.ones(len(inside), 1, tokens, tokens, dtype=torch.bool, device=inside.device)
        mask[:, 0, : inside.shape[1], -inside.shape[2] :] = inside
        return mask

    def loss(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        """The terms of `point_loss`; `_i` is the prediction before block i of those that hold queries."""
        config = self.config
        return point_loss(
            outputs,
            self._on_whole_patches(targets),
            config,
            points=config.loss_points,
            oversample=config.oversample,
            importance=config.importance,
        )

    def postprocess(self, outputs: Outputs, frame: Frame, want: Collection[Wanted] = ("maps",)) -> Prediction:
        """Maps, instances and class maps; masks are made once, of the queries that anything needs."""
        return super().postprocess(outputs, replace(frame, canvas=self._whole(frame.canvas)), want)

    def truth(self, targets: Targets, outputs: Outputs) -> Outputs:
        """The outputs "classes" and "masks" of the ground truth, in the queries that are nearest to it."""
        return super().truth(self._on_whole_patches(targets), outputs)

    def _whole(self, canvas: tuple[int, int]) -> tuple[int, int]:
        """The canvas, up to whole patches."""
        height, width = (-(-side // self.config.patch) * self.config.patch for side in canvas)
        return height, width

    def _on_whole_patches(self, targets: Targets) -> Targets:
        """The targets on the canvas that masks cover."""
        segments = F.pad(targets.segments, _to_whole(targets.segments, self.config.patch))
        return replace(
            targets, segments=segments, frame=replace(targets.frame, canvas=self._whole(targets.frame.canvas))
        )


class ScaleBlock(nn.Module):
    """Twice the resolution: a transposed convolution, GELU, a depthwise convolution, a norm over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, C, 2 h, 2 w]."""
        x = self.conv2(F.gelu(self.conv1(x)))
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def phases(config: EoMTConfig, total: int) -> Phases:
    """The steps between which the masks of each block are trained away, in a run of `total`."""
    published = published_phases(config.query_blocks, total)
    if not config.anneal_starts:
        return published
    return tuple(zip(config.anneal_starts, config.anneal_ends, strict=True))


def _to_whole(x: Tensor, patch: int) -> tuple[int, int, int, int]:
    """The padding of the last two axes, at the right and the bottom, to multiples of the patch."""
    return (0, -x.shape[-1] % patch, 0, -x.shape[-2] % patch)


def _check(config: EoMTConfig) -> None:
    """Refuse options that do not fit each other.

    Raises:
        ValueError: names the option.
    """
    if config.divisor % config.patch:
        raise ValueError(f"divisor {config.divisor}: must be a multiple of the patch, {config.patch}")
    count = config.query_blocks
    for name in ("anneal_starts", "anneal_ends"):
        if len(getattr(config, name)) not in (0, count):
            raise ValueError(f"{name} {getattr(config, name)}: one for each of the {count} query_blocks, or none")
    if len(config.anneal_starts) != len(config.anneal_ends) or any(
        start > end for start, end in zip(config.anneal_starts, config.anneal_ends, strict=True)
    ):
        raise ValueError(
            f"anneal_starts {config.anneal_starts}, anneal_ends {config.anneal_ends}: both or none, and no end before "
            "its start"
        )
    foreign = [
        option.name
        for option in fields(Backbone)
        if option.name not in ALWAYS and getattr(config.backbone, option.name) != getattr(Backbone(), option.name)
    ]
    if foreign:
        raise ValueError(f"backbone.{foreign[0]}: EoMT's backbone does not have this option")


def _backbone(config: EoMTConfig) -> ViT:
    """The backbone of the configuration, with the weights of timm where it asks for them, its first stages frozen."""
    vit = ViT(
        config.backbone.name,
        config.canvas,
        config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        hidden=config.hidden,
        rope_rescale=config.rope_rescale,
    )
    if config.backbone.weights in imagenet.NAMES:
        load_weights(vit, imagenet.imagenet_weights(config.backbone.timm_name))
    vit.freeze_stages(config.backbone.freeze)
    return vit
