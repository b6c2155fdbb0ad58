"""Mask annealing (Kerssies et al., arXiv 2503.19108, section 3.3): masks of attention are trained away block by block.

A block's masks are on until it begins, and then apply with a probability that falls to 0; the model that comes out
needs none. All of it is a function of the step, so that a continued run anneals as if it had not been interrupted.

Shapes: L blocks that hold queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Phases = tuple[tuple[int, int], ...]
"""The last step at which masks apply for certain, and the first without any, for each block."""


def published_phases(blocks: int, total: int) -> Phases:
    """A sixth of the run for each block, the first from T / 6 on, the last until 5 T / 6; those between evenly.

    The last sixth is trained without masks. Rounded half up, as in the published configurations.

    Args:
        blocks: L.
        total: T, iterations of the run.
    """
    gaps = max(1, blocks - 1)
    sixths = [(gaps + 3 * block, gaps) for block in range(blocks)]  # of T / 6, as fractions

    def steps(numerator: int, denominator: int) -> int:
        return (2 * total * numerator + 6 * denominator) // (12 * denominator)

    return tuple((steps(over, under), steps(over + under, under)) for over, under in sixths)


def mask_probability(step: Tensor, start: int, end: int, power: float = 0.9) -> Tensor:
    """The probability with which the masks of a block apply: 1 until step `start`, 0 from step `end` on, float scalar.

    Args:
        step: int64 scalar, iteration from 0; as a tensor, so that a compiled graph takes it as a value.
        start, end: of the block's phase.
        power: exponent of the fall.
    """
    return ((end - step) / max(1, end - start)).clamp(0, 1) ** power


def certain(step: int, start: int, end: int) -> bool:
    """The masks of a block apply for certain at this step, so that nothing need be drawn."""
    return end - step >= max(1, end - start)
