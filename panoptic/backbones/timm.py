"""Any convolutional or hierarchical model of timm as a pyramid.

Shapes: B images, H x W canvas, h x w a feature map, C channels.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from panoptic.backbones.config import STEM_AND_STAGES
from panoptic.layers.norm import freeze, frozen_batch_norm

if TYPE_CHECKING:
    from timm.models import FeatureInfo

OWN_NAMES = (
    *("resnet14", "resnet14_double3x3", "resnet50_double3x3", "resnet101_double3x3", "res2net14_26w_4s"),
    *("swin_tiny", "swin_small", "swin_base", "swin_large"),
)
"""Names of our own backbones that resemble none of timm's, for messages about a name that is neither."""


class TimmBackbone(nn.Module):
    """The last four levels of a timm feature pyramid, as "res2" to "res5"; a level before them is "stem".

    Args:
        name: timm's.
        output_stride: 32, 16 or 8, where the model allows less than 32.
        last: the coarsest level that is wanted; stages beyond it are left out.

    Raises:
        ValueError: timm does not know the model, or its features are no pyramid of strides 4, 8, 16, 32.
    """

    def __init__(self, name: str, output_stride: int = 32, last: str = "res5") -> None:
        import timm  # takes seconds, and most models need nothing of it

        super().__init__()
        self.name = name
        options: dict[str, Any] = {} if output_stride == 32 else {"output_stride": output_stride}
        try:
            self.body = timm.create_model(name, features_only=True, **options)
        except (RuntimeError, TypeError, AttributeError) as error:
            near = ""
            if not timm.is_model(name):
                names = [*OWN_NAMES, *timm.list_models()]
                near = f"; near names: {', '.join(get_close_matches(name, names, 5, 0.5)) or 'none'}"
            raise ValueError(
                f"backbone.name: timm cannot build {name!r} as a feature pyramid of output stride {output_stride} "
                f"({error}){near}"
            ) from error
        info = cast("FeatureInfo", self.body.feature_info)
        strides = [min(4 * 2**k, output_stride) for k in range(4)]
        if list(info.reduction())[-4:] != strides:
            raise ValueError(
                f"backbone.name: the features of {name} have strides {info.reduction()}, not {strides}; "
                "choose a convolutional or hierarchical model"
            )
        names = STEM_AND_STAGES[-len(info.reduction()) :]
        count = names.index(last) + 1
        if count < len(names):
            kept = len(info.reduction()) - len(names) + count
            self.body = timm.create_model(name, features_only=True, out_indices=range(kept), **options)
            _drop_blocks(self.body, str(info.module_name()[kept - 1]))
        self.channels = dict(zip(names[:count], info.channels()[-5:], strict=False))
        self.strides = dict(zip(names[:count], info.reduction()[-5:], strict=False))
        self.taps = dict(zip(names[:count], info.module_name()[-5:], strict=False))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] to the feature maps [B, C, h, w]; channels-last models (Swin) are turned round."""
        features = dict(zip(self.channels, self.body(x)[-len(self.channels) :], strict=True))
        return {
            name: x if x.shape[1] == self.channels[name] else x.permute(0, 3, 1, 2).contiguous()
            for name, x in features.items()
        }

    def freeze_stages(self, count: int) -> None:
        """Freeze the first `count` stages: 0 = nothing, 1 = the stem, up to 5 = everything.

        A stage ends with the module whose output is its feature map; everything that timm registers before it freezes.

        Raises:
            ValueError: the stages cannot be told apart.
        """
        if count == 0:
            return
        order = [name for name, _ in self.body.named_modules() if name]
        whole = count > STEM_AND_STAGES.index(next(reversed(self.taps)))
        stop = len(order) if whole else self._end_of_stage(order, STEM_AND_STAGES[count - 1])
        # the largest modules that lie before the end as a whole
        parts: list[str] = []
        for name in order[:stop]:
            inside = bool(parts) and name.startswith(f"{parts[-1]}.")
            if not inside and not any(later.startswith(f"{name}.") for later in order[stop:]):
                parts.append(name)
        freeze(self.body, parts, _frozen_norm)

    def stage_of(self, name: str) -> int:
        """The stage of a parameter: 0 = the stem, 1 to 4 = res2 to res5, by what `freeze_stages` freezes.

        Raises:
            ValueError: the stages cannot be told apart.
        """
        order = [module for module, _ in self.body.named_modules() if module]
        place = order.index(name.removeprefix("body.").rpartition(".")[0])
        last = STEM_AND_STAGES.index(next(reversed(self.taps)))
        ends = (self._end_of_stage(order, stage) for stage in STEM_AND_STAGES[:last])
        return next((k for k, end in enumerate(ends) if place < end), last)

    def _end_of_stage(self, order: list[str], stage: str) -> int:
        """The number of modules, in order of registration, that come no later than the stage's last."""
        if stage not in self.taps:  # a pyramid without a level of its own for the stem
            tap = self._registered(order, self.taps["res2"])
            return order.index(tap)
        tap = self._registered(order, self.taps[stage])
        return max(i for i, name in enumerate(order) if name == tap or name.startswith(f"{tap}.")) + 1

    def _registered(self, order: list[str], tap: str) -> str:
        """The name under which timm registers the module of a tap."""
        for name in (tap, tap.replace(".", "_", 1)):  # timm flattens the first level of some models
            if name in order:
                return name
        raise ValueError(f"backbone.freeze: the stages of {self.name} cannot be told apart; use 0 or 5")


def _drop_blocks(body: nn.Module, tap: str) -> None:
    """Remove the groups of blocks behind a tap such as "blocks.4", which timm's EfficientNets keep and run in vain."""
    group, _, number = tap.partition(".")
    blocks = body.get_submodule(group) if number.isdecimal() and group == "blocks" else None
    if isinstance(blocks, nn.Sequential):
        del blocks[int(number) + 1 :]


def _frozen_norm(norm: nn.Module) -> nn.Module:
    """The constant norm of a batch norm, without a counter: checkpoints of frozen pyramids have never held one.

    timm's own frozen norm would multiply and add in float32 whatever the precision: a frozen EfficientNet-Lite0 in
    bfloat16 took 52 ms for four images of 192x320 on one core with it, and takes 29 ms.
    """
    frozen = frozen_batch_norm(norm)
    del frozen.num_batches_tracked
    return frozen
