"""Loss terms of dense prediction.

Every term keeps its graph when there is nothing to learn from: the value is 0 and every prediction
gets a gradient (of zeros), so that distributed training never waits for a missing one.

Shapes: B images, C classes, H x W pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.segmentation import IGNORE


def pixel_cross_entropy(logits: Tensor, semantic: Tensor, weights: Tensor | None = None) -> Tensor:
    """The cross-entropy of each pixel times its weight, float [B, H, W]; 0 where `IGNORE`.

    Args:
        logits: [B, C, H, W].
        semantic: int64 [B, H, W], `IGNORE` where void or padding.
        weights: float [B, H, W]; None means 1.
    """
    losses = F.cross_entropy(logits, semantic, ignore_index=IGNORE, reduction="none")
    return losses if weights is None else losses * weights


def top_k_cross_entropy(
    logits: Tensor, semantic: Tensor, weights: Tensor | None = None, fraction: float = 0.2
) -> Tensor:
    """Bootstrapped cross-entropy ("hard pixel mining"): the mean over the hardest share of all pixels.

    Ignored pixels stay in the vector as zeros and count in the number of pixels, over the whole batch:
    k = int(fraction * B * H * W). (DeeperLab, arXiv 1902.05093; Panoptic-DeepLab, arXiv 1911.10194.)

    Args:
        logits: [B, C, H, W].
        semantic: int64 [B, H, W], `IGNORE` where void or padding.
        weights: float [B, H, W]; None means 1.
        fraction: share of the pixels; 1 is the plain mean over all of them, ignored ones included.
    """
    losses = pixel_cross_entropy(logits, semantic, weights).flatten()
    if fraction >= 1.0:
        return losses.mean()
    return losses.topk(max(1, int(fraction * losses.numel())), sorted=False).values.mean()


def cross_entropy(logits: Tensor, semantic: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted cross-entropy averaged over the number of pixels that are not ignored.

    Args:
        logits: [B, C, H, W].
        semantic: int64 [B, H, W], `IGNORE` where void or padding.
        weights: float [B, H, W]; None means 1.
    """
    losses = pixel_cross_entropy(logits, semantic, weights)
    return losses.sum() / (semantic != IGNORE).sum().clamp(min=1)


def ohem_cross_entropy(
    logits: Tensor,
    semantic: Tensor,
    weights: Tensor | None = None,
    threshold: float = 0.7,
    min_kept: int = 100_000,
) -> Tensor:
    """Online hard example mining: the mean over pixels whose true class has a probability below a bound.

    The bound is `threshold`, or the probability of the pixel that stands `min_kept` places above the
    least probable one where that is larger, so that about `min_kept` pixels are kept at least.

    Args:
        logits: [B, C, H, W].
        semantic: int64 [B, H, W], `IGNORE` where void or padding.
        weights: float [B, H, W]; None means 1.
        threshold: a probability.
        min_kept: a number of pixels of the batch.
    """
    losses = pixel_cross_entropy(logits, semantic, weights)
    counted = semantic != IGNORE
    with torch.no_grad():
        truth = semantic.clamp(min=0)[:, None]
        probability = logits.softmax(1).gather(1, truth)[:, 0].masked_fill(~counted, torch.inf)
        # the device alone knows the number of pixels that count: the host takes the most that may be asked for
        most = min(max(1, min_kept), probability.numel() - 1)
        least = probability.flatten().topk(most + 1, largest=False).values
        place = (counted.sum() - 1).clamp(0, most)
        kept = counted & (probability < least.gather(0, place[None]).clamp(min=threshold))
    return (losses * kept).sum() / kept.sum().clamp(min=1)


def masked_squared_error(prediction: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The sum of weighted squared errors over the sum of weights; 0, with its graph, where all weights are 0.

    Args:
        prediction: [B, 1, H, W].
        target: float [B, 1, H, W].
        weights: float [B, 1, H, W].
    """
    return _weighted_mean((prediction - target) ** 2 * weights, weights.sum())


def masked_absolute_error(prediction: Tensor, target: Tensor, weights: Tensor, per_channel: bool) -> Tensor:
    """The sum of weighted absolute errors over the sum of weights; 0, with its graph, where all weights are 0.

    Args:
        prediction: [B, 2, H, W].
        target: float [B, 2, H, W].
        weights: float [B, 1, H, W].
        per_channel: divide by the weights of every channel, so a pixel counts twice (bowenc0221);
            otherwise by those of one (detectron2), which is exactly twice as much.
    """
    total = weights.sum() * prediction.shape[1] if per_channel else weights.sum()
    return _weighted_mean((prediction - target).abs() * weights, total)


def foreground_cross_entropy(logits: Tensor, foreground: Tensor, valid: Tensor | None = None) -> Tensor:
    """Binary cross-entropy of the foreground branch, averaged over the valid pixels.

    Void counts as background: that is what the branch is for (Panoptic-DeepLab in PyTorch, section 4).

    Args:
        logits: [B, 1, H, W].
        foreground: bool [B, H, W].
        valid: bool [B, H, W], False in batch padding; None means that there is none.
    """
    losses = F.binary_cross_entropy_with_logits(logits[:, 0], foreground.to(logits.dtype), reduction="none")
    if valid is None:
        return losses.mean()
    return _weighted_mean(losses * valid, valid.sum())


def squared_kernels(model: nn.Module) -> Tensor:
    """Half the sum of squares of all trainable kernels, of convolutions and linear layers: L2 as TensorFlow has it.

    Biases and what belongs to norms are left out, as everything of one dimension is.
    """
    return torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad and p.ndim > 1]).sum() / 2


def _weighted_mean(values: Tensor, total: Tensor) -> Tensor:
    """The sum of `values` over `total`, or over 1 where that is 0 (the values are then 0 as well)."""
    return values.sum() / torch.where(total > 0, total, torch.ones_like(total))


# Score maps and the masks of kernels (Panoptic FCN)


def soft_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss of logits against soft targets in 0..1, of the shape of both.

    RetinaNet's formula with the target in place of 0 and 1: p_t = p t + (1 - p) (1 - t), alpha alike.
    """
    probability = logits.sigmoid()
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    right = probability * targets + (1 - probability) * (1 - targets)
    return losses * (1 - right) ** gamma * (alpha * targets + (1 - alpha) * (1 - targets))


def squared_dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The dice loss with squares in the denominator (arXiv 1606.04797) of K predictions of each of P masks, [P, K].

    Args:
        logits: [P, K, cells].
        targets: float [P, cells] in 0..1.
    """
    probability = logits.sigmoid()
    shared = (probability @ targets[:, :, None])[..., 0]
    total = torch.linalg.vecdot(probability, probability) + torch.linalg.vecdot(targets, targets)[:, None]
    return 1 - 2 * shared / total.clamp(min=1e-8)


# Sets of boxes and masks (DETR, MaskFormer)


def query_cross_entropy(logits: Tensor, classes: Tensor, no_object_weight: float = 0.1) -> Tensor:
    """The cross-entropy of each group of queries, [G], a weighted mean in which "no object" counts less.

    Args:
        logits: [G, Q, K + 1], "no object" last.
        classes: int64 [G, Q], the logit that each query should choose.
        no_object_weight: of queries without a target; others weigh 1.
    """
    weights = torch.where(classes == logits.shape[-1] - 1, no_object_weight, 1.0)
    losses = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(weights)
    return (losses * weights).sum(1) / weights.sum(1)


def focal_and_dice(logits: Tensor, masks: Tensor, alpha: float = 0.25) -> tuple[Tensor, Tensor]:
    """The mean focal loss over pixels (arXiv 1708.02002, gamma 2) and the dice loss of each mask, [M] each.

    Both follow from one sigmoid: that of the logit with the sign turned where the mask is, the probability of error.

    Args:
        logits: [M, P].
        masks: bool [M, P].
        alpha: weight of pixels inside; 1 - alpha outside.
    """
    turned = torch.where(masks, -logits, logits)
    error = turned.sigmoid()
    focal = F.softplus(turned) * error * error
    missed, spilt = (error * masks).sum(1), (error * ~masks).sum(1)
    area = masks.sum(1)
    inside, outside = (focal * masks).sum(1), (focal * ~masks).sum(1)
    # with p the probabilities and t the mask, p.t = |t| - missed and |p| = |t| - missed + spilt
    dice = 1 - (2 * (area - missed) + 1) / (2 * area - missed + spilt + 1)
    return (alpha * inside + (1 - alpha) * outside) / logits.shape[1], dice


def box_corners(boxes: Tensor) -> Tensor:
    """The corners x0 y0 x1 y1 of boxes [..., 4] that are given as centre and size."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def cross_entropy_and_dice(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The mean binary cross-entropy over points and the dice loss of each mask, [M] each.

    Args:
        logits: [M, P].
        masks: float [M, P], 0 to 1.
    """
    probability = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(1)
    shared = torch.linalg.vecdot(probability, masks)
    return entropy, 1 - (2 * shared + 1) / (probability.sum(1) + masks.sum(1) + 1)


def generalised_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """The generalised IoU of boxes with others, [...], -1 to 1 (Rezatofighi et al., arXiv 1902.09630).

    Args:
        boxes: [..., 4], x0 y0 x1 y1.
        others: the same, of a shape that broadcasts to theirs.
    """
    widths, heights = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    other_widths, other_heights = (others[..., 2:] - others[..., :2]).unbind(-1)
    # sides of the intersection, and of the smallest box around both
    common = (torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(boxes[..., :2], others[..., :2])).clamp(
        min=0
    )
    hull = torch.maximum(boxes[..., 2:], others[..., 2:]) - torch.minimum(boxes[..., :2], others[..., :2])
    smallest = torch.finfo(boxes.dtype).tiny  # two boxes that are points have no union
    intersection, around = common.prod(-1), hull.prod(-1).clamp(min=smallest)
    union = (widths * heights + other_widths * other_heights - intersection).clamp(min=smallest)
    return intersection / union - (around - union) / around
