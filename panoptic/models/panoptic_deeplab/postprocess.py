"""Merge rules: from dense predictions to panoptic maps, vectorised over instances.

Centre grouping is Panoptic-DeepLab's post-processing (Cheng et al., arXiv 1911.10194; "Panoptic-DeepLab
in PyTorch", section 2.3), with the tie rules of the two published implementations: the first of equally
near centres, the smallest of equally frequent classes. Maps come in cropped to the image: nothing here
knows about batch padding.

Shapes: H x W pixels, C classes, K centres, P pixels of things.
"""

from __future__ import annotations

import torch
from torch import Tensor

from panoptic.models.panoptic_deeplab.grouping import _blocks, find_centres, group_pixels
from panoptic.segmentation import Categories, Segmentation


def merge_centres(
    semantic: Tensor,
    heatmap: Tensor,
    offset: Tensor,
    categories: Categories,
    *,
    threshold: float = 0.1,
    kernel: int = 7,
    top_k: int | None = 200,
    stuff_area: int = 2048,
    foreground: Tensor | None = None,
) -> Segmentation:
    """Panoptic-DeepLab's merge of one image.

    Every instance takes the class that most of its thing pixels have, the smallest of equally frequent ones.

    Args:
        semantic: int [H, W], contiguous classes; values outside 0..C-1 are void.
        heatmap: float [H, W].
        offset: float [2, H, W], (dy, dx) in pixels of this map.
        categories: tell things from stuff.
        threshold: of `find_centres`.
        kernel: of `find_centres`.
        top_k: of `find_centres`.
        stuff_area: stuff of fewer pixels becomes void.
        foreground: bool [H, W], where instances may be; None means wherever the class is a thing. Stuff
            inside of it and things outside become void, as in bowenc0221.

    Returns:
        instances in the order of their centres, then stuff in the order of classes; `scores` is None.
    """
    is_thing = torch.tensor([False, *categories.is_thing], device=semantic.device)  # entry 0 is void
    classes = semantic.int().add_(1) if semantic.dtype != torch.int32 else semantic + 1
    classes.masked_fill_((classes < 0) | (classes > len(categories)), 0)
    thing = is_thing.index_select(0, classes.view(-1)).view_as(classes) if foreground is None else foreground
    centres = find_centres(heatmap, threshold, kernel, top_k)
    segments = group_pixels(centres, offset, thing)

    wide = len(is_thing)
    votes = torch.zeros((len(centres) + 1) * wide, dtype=torch.int64, device=semantic.device)
    for lines in _blocks(segments.shape, segments.device):
        segments[lines] *= wide
        segments[lines] += classes[lines]  # now (instance, class) in one number
        votes += torch.bincount(segments[lines].view(-1), minlength=len(votes))
    table, labels = _election(votes.view(-1, wide), is_thing, stuff_area)
    for lines in _blocks(segments.shape, segments.device):
        segments[lines] = table.index_select(0, segments[lines].view(-1)).view(-1, segments.shape[1])
    return Segmentation(segments.cpu().numpy(), labels.cpu().numpy())


def _election(votes: Tensor, is_thing: Tensor, stuff_area: int) -> tuple[Tensor, Tensor]:
    """What becomes of each pair (instance or none, class or void), given how many pixels have it.

    Args:
        votes: int64 [K + 1, C + 1]; row 0 is no instance, column 0 is void.
        is_thing: bool [C + 1].
        stuff_area: as in `merge_centres`.

    Returns:
        int32 [(K + 1) * (C + 1)], the segment of each pair, and the labels, int64 [N].
    """
    ballots = votes[1:] * is_thing
    alive = ballots.sum(1) > 0
    classes = ballots.argmax(1)[alive]
    stuff = torch.nonzero((votes[0] >= max(1, stuff_area)) & ~is_thing)[:, 0]
    stuff = stuff[stuff > 0]
    table = torch.zeros_like(votes, dtype=torch.int32)
    table[1:] = (alive.cumsum(0) * alive)[:, None] * is_thing
    table[0, stuff] = torch.arange(1, len(stuff) + 1, dtype=torch.int32, device=votes.device) + len(classes)
    return table.view(-1), torch.cat([classes, stuff]) - 1
