"""One-to-one matching of queries and targets at the lowest cost (Carion et al., "DETR", arXiv 2005.12872, section 3.1).

Costs are batched matrices in float32, whatever the autocast; what does not depend on a pair is summed
once instead of per pair. The assignment itself is SciPy's, one copy to the host for all groups; what the host knows
from it (how many pairs each group and image has) is never asked of the device again.

Shapes: B images, G groups (one for each decoder layer and image, layers outermost: group g is of image
g % B), Q queries, N targets (padded), C classes, P pixels or points.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Matches:
    """M pairs of a query and a target, ordered by group, then by query."""

    groups: Tensor
    """int64 [M], the group of each pair; the image is this modulo B, the decoder layer this divided by B."""
    queries: Tensor
    """int64 [M], places among Q."""
    targets: Tensor
    """int64 [M], places among the padded N."""
    listed: np.ndarray
    """int64 [M], the groups on the CPU."""
    finite: bool = True
    """False where a cost was not finite: the pairs mean nothing then, and nothing may be learnt from them."""

    def of(self, start: int, count: int) -> Matches:
        """The pairs of `count` groups from group `start` on, with groups counted from 0: one decoder layer."""
        inside = slice(*np.searchsorted(self.listed, (start, start + count)).tolist())
        groups, listed = self.groups[inside] - start, self.listed[inside] - start
        return replace(self, groups=groups, queries=self.queries[inside], targets=self.targets[inside], listed=listed)

    def learnable(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms of a loss, with their gradients not a number where a cost was not finite: the step is skipped.

        Terms of matched queries alone may be finite where the outputs of others are not.
        """
        return terms if self.finite else {name: value * math.nan for name, value in terms.items()}

    def per_image(self, images: int) -> list[int]:
        """The number of pairs of each of the B images, over all groups."""
        return np.bincount(self.listed % images, minlength=images).tolist()


@torch.no_grad()
def hungarian(cost: Tensor, valid: Tensor, names: Sequence[str]) -> Matches:
    """The assignment of lowest total cost of each group: min(Q, valid targets) pairs, none without a target.

    Args:
        cost: [G, Q, N]; entries of invalid targets may be anything.
        valid: bool [B, N], False for padding and for targets that no query may take.
        names: B names of images; a warning says those whose costs are not finite.

    Returns:
        the pairs, on the device of `cost`. Where a cost is not finite they are any, and `Matches.finite` is False:
        an exception would end a training whose next step may be a good one, and leave other workers waiting.
    """
    images = len(valid)
    usable = valid.repeat(len(cost) // max(images, 1), 1)[:, None]
    # one more row says which targets count, so that the device is waited for once
    table = torch.cat([cost.float().masked_fill(~usable, 0.0), usable.to(torch.float32)], 1).cpu().numpy()
    table, columns = table[:, :-1], table[:images, -1] > 0
    broken = np.flatnonzero(~np.isfinite(table).all((1, 2)))
    if len(broken):
        unique = dict.fromkeys(names[g % images] for g in broken.tolist())
        logger.warning(
            "matching: the cost is not finite for %s; outputs of the network are not finite or beyond float32",
            ", ".join(unique),
        )
        table[broken] = 0
    assigned = [_assign(table[g], np.flatnonzero(columns[g % images])) for g in range(len(table))]
    groups = np.repeat(np.arange(len(assigned)), [len(queries) for queries, _ in assigned])
    queries, targets = (np.concatenate([np.zeros(0, np.int64), *(pair[k] for pair in assigned)]) for k in (0, 1))
    pairs = torch.from_numpy(np.stack([groups, queries, targets]).astype(np.int64))
    here = pairs.to(cost.device, non_blocking=True)
    return Matches(here[0], here[1], here[2], groups, not len(broken))


def _assign(cost: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of one group of lowest cost [Q, N], of the targets `columns` (int64) only."""
    from scipy.optimize import linear_sum_assignment  # a tenth of a second that most processes need not spend

    queries, chosen = linear_sum_assignment(cost[:, columns])
    return queries, columns[chosen]


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the probability of each target's class, [G, Q, N].

    Args:
        logits: [G, Q, C], "no object" among the classes.
        labels: int64 [G, N]; padding may be negative.
    """
    index = labels.clamp(min=0)[:, None].expand(-1, logits.shape[1], -1)
    return -logits.float().softmax(-1).gather(2, index)


def focal_cost(logits: Tensor, masks: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The mean focal loss over pixels of each mask against each target, [G, Q, N] (Lin et al., arXiv 1708.02002).

    Args:
        logits: [G, Q, P].
        masks: [G, N, P], 0 to 1.
    """
    logits = logits.float()
    probability = logits.sigmoid()
    inside = alpha * (1 - probability) ** gamma * F.softplus(-logits)
    outside = (1 - alpha) * probability**gamma * F.softplus(logits)
    return _pairwise(inside, outside, masks)


def cross_entropy_cost(logits: Tensor, masks: Tensor) -> Tensor:
    """The mean binary cross-entropy of each mask against each target, [G, Q, N].

    BCE(x, t) is softplus(x) - t x: one product of matrices instead of two.

    Args:
        logits: [G, Q, P].
        masks: [G, N, P], 0 to 1.
    """
    logits = logits.float()
    return (F.softplus(logits).sum(2)[:, :, None] - _products(logits, masks)) / logits.shape[2]


def dice_cost(logits: Tensor, masks: Tensor) -> Tensor:
    """The dice loss 1 - (2 p.t + 1) / (|p| + |t| + 1) of each mask with each target, [G, Q, N] (arXiv 1606.04797).

    Args:
        logits: [G, Q, P].
        masks: [G, N, P], 0 to 1.
    """
    probability, masks = logits.float().sigmoid(), masks.float()
    areas = probability.sum(2)[:, :, None] + masks.sum(2)[:, None]
    return 1 - (2 * _products(probability, masks) + 1) / (areas + 1)


def _pairwise(inside: Tensor, outside: Tensor, masks: Tensor) -> Tensor:
    """The mean over pixels of `inside` where the mask is 1 and of `outside` where it is 0, [G, Q, N]."""
    return (_products(inside - outside, masks) + outside.sum(2)[:, :, None]) / inside.shape[2]


def _products(values: Tensor, masks: Tensor) -> Tensor:
    """The products of values [G, Q, P] and masks [G, N, P], [G, Q, N], in float32 under autocast too."""
    with torch.autocast(values.device.type, enabled=False):
        return torch.bmm(values.float(), masks.float().transpose(1, 2))
