"""Plain vision transformers of timm, block by block: DINOv2, DINOv3, and any of their shape.

timm's models run as a whole; an encoder that holds queries (EoMT) needs to stop between two blocks, to put tokens in
front, and to mask attention. `ViT` gives the steps: `embed`, `block` for each block, `normalise`, `patches`.

Two flavours are known by their parts, not by their names. DINOv2's (`VisionTransformer`): learned positions, which are
resampled to other grids. DINOv3's (`Eva`): rotary positions of the patches, which in training are scaled by one random
number a forward pass, as published.

Published weights: patch kernels of another size (DINOv2's 14 pixels) are resampled by the pseudo-inverse of the resize
(FlexiViT: Beyer et al., arXiv 2212.08013, section 3.4), positions bicubically.

Shapes: B images, H x W canvas, h x w patches, C channels, P prefix tokens (class token and registers), Q tokens put in
front, N = Q + P + h w tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from panoptic.backbones.config import STEM_AND_STAGES
from panoptic.backbones.stages import freeze_vit, vit_layer

if TYPE_CHECKING:
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3

META = {"register_tokens": "reg_token", "mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
"""timm's names of parameters in Meta's own DINOv2 files."""


class ViT(nn.Module):
    """A plain ViT of timm, whose blocks are called one by one.

    Args:
        name: timm's (`vit_large_patch14_reg4_dinov2`, `vit_base_patch16_dinov3_qkvb`).
        canvas: (H, W) for which learned positions are kept; other canvases get them resampled at every pass.
        patch: pixels along the side of a patch.
        width, depth, heads, hidden: C, number of blocks, heads of each, rows of the first layer of their MLPs (of
            DINOv2's gated ones both halves); 0 = what the name says. No checkpoint tells the heads.
        rope_rescale: largest factor by which the coordinates of rotary positions are stretched or shrunk in training.

    Raises:
        ValueError: timm does not know the model, it is no plain ViT, or the sizes do not fit.
    """

    def __init__(
        self,
        name: str,
        canvas: tuple[int, int],
        patch: int = 16,
        *,
        width: int = 0,
        depth: int = 0,
        heads: int = 0,
        hidden: int = 0,
        rope_rescale: float = 2.0,
    ) -> None:
        super().__init__()
        if any(side % patch for side in canvas):
            raise ValueError(f"canvas {canvas[0]}x{canvas[1]}: both sides must be multiples of the patch, {patch}")
        self.name, self.patch = name, patch
        self.grid = (canvas[0] // patch, canvas[1] // patch)
        self.rope_rescale = rope_rescale
        sizes: dict[str, Any] = {"embed_dim": width, "depth": depth, "num_heads": heads}
        self.body = _plain_vit(name, canvas, patch, hidden, {key: size for key, size in sizes.items() if size})
        self.width, self.depth = self.body.embed_dim, len(self.body.blocks)
        self.prefix: int = self.body.num_prefix_tokens

    def hold_tokens(self, count: int, blocks: int) -> None:
        """Prepare the last `blocks` blocks for `count` tokens in front of the others, which have no position."""
        if self._rope is not None:  # timm rotates whatever follows the prefix
            for index in range(self.depth - blocks, self.depth):
                self.body.blocks[index].attn.num_prefix_tokens = count + self.prefix

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
        """The tokens before the first block.

        Args:
            x: normalised images [B, 3, H, W], sides multiples of the patch.

        Returns:
            tokens [B, P + h w, C] (class token, registers, patches by rows), the sines and cosines of rotary positions
            [h w, 2 C / heads] or None, and (h, w).
        """
        body = self.body
        patches = body.patch_embed(x)  # [B, h, w, C]
        grid = (patches.shape[1], patches.shape[2])
        patches = patches.flatten(1, 2)
        front = [token.expand(x.shape[0], -1, -1) for token in (body.cls_token, body.reg_token) if token is not None]
        if body.pos_embed is None:
            tokens = torch.cat([*front, patches], 1)
        elif body.no_embed_class:
            tokens = torch.cat([*front, patches + resample_positions(body.pos_embed, self.grid, grid)], 1)
        else:  # class token and registers have positions, too
            tokens = torch.cat([*front, patches], 1) + resample_positions(
                body.pos_embed, self.grid, grid, prefix=self.prefix
            )
        return body.norm_pre(tokens), self._rotary(grid, x.device), grid

    def block(self, index: int, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Tokens [B, N, C] after block `index` (from 0).

        Args:
            index: of the block.
            x: the tokens before it.
            rope: of `embed`.
            mask: bool [B, 1, N, N], True where a token (row) may look at another; everywhere by default.
        """
        block = self.body.blocks[index]
        return block(x, attn_mask=mask) if rope is None else block(x, rope=rope, attn_mask=mask)

    def normalise(self, x: Tensor) -> Tensor:
        """The final layer norm."""
        return self.body.norm(x)

    def patches(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The map [B, C, h, w] of the patches among tokens [B, N, C], which are the last of them."""
        height, width = grid
        return x[:, -height * width :].transpose(1, 2).unflatten(2, grid)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] to the map [B, C, h, w] of the last block, through the final norm."""
        x, rope, grid = self.embed(x)
        for index in range(self.depth):
            x = self.block(index, x, rope)
        return self.patches(self.normalise(x), grid)

    @property
    def _rope(self) -> RotaryEmbeddingDinoV3 | None:
        """timm's rotary positions; None where positions are learned."""
        return getattr(self.body, "rope", None)

    def _rotary(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Sines and cosines of the patches' positions, float32 [h w, 2 C / heads]; see `rotary_positions`."""
        rope = self._rope
        if rope is None:
            return None
        scale = None
        if self.training and self.rope_rescale > 1:
            scale = torch.exp((2 * torch.rand(1, device=device) - 1) * math.log(self.rope_rescale))
        return rotary_positions(grid, cast(Tensor, rope.periods), scale)

    def fitted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a file of timm's or Meta's names under this module's names, resampled to its sizes.

        What the model has no place for (a classifier, DINO's mask token) is left out.
        """
        own = self.state_dict()
        renamed: dict[str, Tensor] = {}
        for key, value in state.items():
            inner = key.removeprefix("body.")
            for theirs, ours in META.items():
                inner = inner.replace(theirs, ours)
            renamed[f"body.{inner}"] = value
        kernel, positions = "body.patch_embed.proj.weight", "body.pos_embed"
        if kernel in renamed and renamed[kernel].shape[2:] != own[kernel].shape[2:]:
            renamed[kernel] = resample_patch_kernel(renamed[kernel], self.patch)
        if positions in renamed and positions in own and renamed[positions].shape != own[positions].shape:
            renamed |= self._fitted_positions(renamed)
        return {key: value for key, value in renamed.items() if key in own}

    def _fitted_positions(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Positions of a file for this model's grid; and its class token where theirs belongs to it (Meta's files).

        Raises:
            ValueError: the positions are those of no square.
        """
        positions = state["body.pos_embed"]
        count = positions.shape[1]
        prefix = next((n for n in {0, 1, self.prefix} if math.isqrt(count - n) ** 2 == count - n), None)
        if prefix is None:
            raise ValueError(f"backbone.weights: pos_embed has {count} positions, which are no square of patches")
        side = math.isqrt(count - prefix)
        kept = 0 if self.body.no_embed_class else self.prefix
        patches = resample_positions(positions[:, prefix:], (side, side), self.grid)
        if kept == prefix:
            return {"body.pos_embed": torch.cat([positions[:, :prefix], patches], 1)}
        if kept == 0 and prefix == 1:  # that of the class token, which has none of its own here
            return {"body.pos_embed": patches, "body.cls_token": state["body.cls_token"] + positions[:, :1]}
        raise ValueError(f"backbone.weights: pos_embed has {prefix} positions before those of patches, {kept} wanted")

    def freeze_stages(self, count: int) -> None:
        """Freeze the first `count` stages: 1 = what comes before the blocks, 2 to 5 = a quarter of the blocks more.

        The last quarter takes the final norm with it; a backbone that is frozen as a whole is the same in training.
        """
        if count == len(STEM_AND_STAGES):
            self.rope_rescale = 1.0
        freeze_vit(self.body, self.depth, count)

    def layer_of(self, name: str) -> int:
        """The layer of a parameter, by which its learning rate decays: see `vit_layer`."""
        return vit_layer(name.removeprefix("body."), self.depth)


def rotary_positions(grid: tuple[int, int], periods: Tensor, scale: Tensor | None = None) -> Tensor:
    """Sines, then cosines, of DINOv3's rotary positions, float32 [h w, 2 d] for heads of d channels.

    The centre of a patch, along each axis from -1 to 1, gives d / 4 angles 2 pi x / period a coordinate, y before x;
    all d / 2 of them are repeated for the other half of the channels.

    Args:
        grid: (h, w).
        periods: [d / 4].
        scale: factor on all coordinates, [1].
    """
    axes = [(2 * torch.arange(side, device=periods.device).float() + 1) / side - 1 for side in grid]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)  # [h w, 2]
    if scale is not None:
        coordinates = coordinates * scale
    angles = (2 * math.pi * coordinates[:, :, None] / periods.float()).flatten(1)  # [h w, d / 2]
    return torch.cat([angles.sin(), angles.sin(), angles.cos(), angles.cos()], 1)


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int], prefix: int = 0) -> Tensor:
    """Learned positions [1, prefix + h w, C] for another grid: bicubic, antialiased, in float32, as timm does it.

    Args:
        positions: those of prefix tokens come first and stay as they are.
        old: (h, w) of the positions.
        new: (h, w) wanted; the tensor itself comes back where it is the old one.
        prefix: number of tokens before the patches that have a position.
    """
    if old == new:
        return positions
    front, patches = positions[:, :prefix], positions[:, prefix:]
    cells = patches.float().transpose(1, 2).unflatten(2, old)
    cells = F.interpolate(cells, size=new, mode="bicubic", antialias=True)
    return torch.cat([front, cells.flatten(2).transpose(1, 2).to(positions.dtype)], 1)


def resample_patch_kernel(kernel: Tensor, side: int) -> Tensor:
    """A patch embedding [C, 3, p, p] for patches of another side, which gives resized patches the same tokens.

    FlexiViT's rule: with R the matrix that resizes a patch, the new kernel is the pseudo-inverse of R applied to the
    old one. Resizing the kernel itself would change the tokens' scale.

    Args:
        kernel: of the old size p.
        side: the new p.
    """
    old = kernel.shape[-1]
    basis = torch.eye(old * old).view(old * old, 1, old, old)
    resized = F.interpolate(basis, size=(side, side), mode="bicubic", antialias=True).flatten(1)  # [p p, side side]
    inverse = torch.linalg.pinv(resized)  # [side side, p p]
    return (kernel.float().flatten(2) @ inverse.T).unflatten(2, (side, side)).to(kernel.dtype)


def _plain_vit(name: str, canvas: tuple[int, int], patch: int, hidden: int, sizes: dict[str, Any]) -> Any:
    """timm's model without a head.

    Raises:
        ValueError: as of `ViT`.
    """
    import timm  # takes seconds, and most models need nothing of it
    from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    if not timm.is_model(name):
        near = ", ".join(get_close_matches(name, timm.list_models("*vit*"), 5, 0.5)) or "none"
        raise ValueError(f"backbone.name: timm has no model {name!r}; near names: {near}")
    options: dict[str, Any] = {"img_size": canvas, "patch_size": patch, "dynamic_img_size": True, **sizes}
    try:
        body = timm.create_model(name, num_classes=0, global_pool="", **options, **_mlp(name, hidden, sizes))
    except (RuntimeError, TypeError, AssertionError, AttributeError) as error:
        raise ValueError(
            f"backbone.name: timm cannot build {name!r} as a plain ViT of {patch}-pixel patches "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    rope = getattr(body, "rope", None)
    if type(body) not in (VisionTransformer, Eva) or not isinstance(rope, RotaryEmbeddingDinoV3 | None):
        raise ValueError(
            f"backbone.name: {name} is no plain ViT with learned positions or DINOv3's rotary ones; choose one such as "
            "vit_small_patch14_reg4_dinov2 or vit_small_patch16_dinov3_qkvb"
        )
    return body


def _mlp(name: str, hidden: int, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """timm's option for the rows of an MLP's first layer."""
    if not hidden:
        return {}
    import timm

    model: Any = None if "embed_dim" in sizes else timm.create_model(name, num_classes=0, depth=1)
    width = sizes["embed_dim"] if model is None else model.embed_dim
    return {"mlp_ratio": (hidden + 0.5) / width}  # timm truncates the product
