"""The figures of a model: parameters by part, how many of them learn, multiply-accumulates, memory of a training.

Multiply-accumulates are half of what torch's own FLOP counter counts in one forward pass of `network` on
tensors without data: matrix products, convolutions and attention, not deformable convolutions, norms or losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from panoptic.metrics.text import text_table
from panoptic.models.base import PanopticModel
from panoptic.training.plain import read_config, to_plain, without_download

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Part:
    """A part of a model: one of its submodules, or the whole."""

    name: str
    parameters: int
    """Numbers in its parameters."""
    trainable: int
    """Numbers in its parameters that learn."""
    macs: int
    """Multiply-accumulates for one image."""


@dataclass(frozen=True)
class Summary:
    """A model in figures."""

    parts: tuple[Part, ...]
    """By submodule, in the order of the model; a parameter of two parts counts in both."""
    whole: Part
    size: tuple[int, int]
    """Height and width of the image of the multiply-accumulates."""
    megabytes: dict[str, float]
    """10^6 bytes of weights, gradients, optimiser and average; what a step keeps of the images comes on top."""


def summarise_model(model: PanopticModel, size: tuple[int, int], slots: int = 0, averaged: bool = False) -> Summary:
    """The figures of a model.

    Args:
        model: with all that is frozen, on any device.
        size: height and width of an image.
        slots: numbers that the optimiser keeps of each one that learns (AdamW two).
        averaged: an average of the weights is kept.
    """
    height, width = (-(-side // model.divisor) * model.divisor for side in size)
    macs = count_macs(model, (height, width))
    parts = tuple(_part(name, child, macs.get(name, 0)) for name, child in model.named_children())
    whole = _part("whole model", model, macs.get("", 0))
    weights = sum(value.nbytes for value in model.state_dict().values()) / 1e6
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad) / 1e6
    memory = {"weights": weights, "gradients": trainable, "optimiser": slots * trainable}
    frozen = sum(p.nbytes for p in model.parameters()) / 1e6 - trainable  # held once: `build_ema`
    return Summary(parts, whole, (height, width), memory | ({"average": weights - frozen} if averaged else {}))


def _part(name: str, module: nn.Module, macs: int) -> Part:
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return Part(name, sum(n for n, _ in counts), sum(n for n, learns in counts if learns), macs)


def count_macs(model: PanopticModel, size: tuple[int, int]) -> dict[str, int]:
    """Multiply-accumulates for one image in each submodule that `network` calls, and in all ("").

    Args:
        model: only its configuration is read.
        size: height and width, multiples of the model's divisor.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    config = read_config(without_download(to_plain(model.config)))
    with torch.device("meta"):  # timm reads values while it builds, which fake tensors would not have
        blank = config.build(model.categories).eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        blank.to_empty(device="cpu")
        clocks = {name: _Clock(child, counter) for name, child in blank.named_children()}
        blank.network(torch.zeros(1, 3, *size, dtype=torch.uint8))
        return {"": counter.get_total_flops() // 2} | {name: clock.flops // 2 for name, clock in clocks.items()}


class _Clock:
    """Operations while any module of a part runs; counted once where one calls another."""

    def __init__(self, part: nn.Module, counter: FlopCounterMode) -> None:
        self.flops, self._depth, self._counter = 0, 0, counter
        for module in part.modules():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self._depth += 1
        if self._depth == 1:
            self.flops -= self._counter.get_total_flops()

    def _leave(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.flops += self._counter.get_total_flops()


def summary_text(summary: Summary) -> str:
    """The figures as a table: a line for each part and one for the whole, then the memory."""
    rows = [("part", "parameters", "trainable", "GMACs")]
    for part in (*summary.parts, summary.whole):
        learns = "frozen" if part.parameters and not part.trainable else f"{part.trainable:,}"
        rows.append((part.name, f"{part.parameters:,}", learns, f"{part.macs / 1e9:.2f}"))
    memory = " + ".join(f"{name} {size:.0f}" for name, size in summary.megabytes.items())
    height, width = summary.size
    total = sum(summary.megabytes.values())
    return f"{text_table(rows)}\none image of {height}x{width}; MB: {memory} = {total:.0f}, beside what a step keeps"
