"""Losses: parity with the published ones, values worked out by hand, and graphs that never break."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from panoptic import losses
from panoptic.segmentation import IGNORE

SEMANTIC = {
    "deeplab_ce_top20": (losses.top_k_cross_entropy, {"fraction": 0.2}),
    "deeplab_ce_top100": (losses.top_k_cross_entropy, {"fraction": 1.0}),
    "deeplab_ce_top15": (losses.top_k_cross_entropy, {"fraction": 0.15}),
    "regular_ce": (losses.cross_entropy, {}),
    "ohem_t07_min1000": (losses.ohem_cross_entropy, {"threshold": 0.7, "min_kept": 1000}),
    "ohem_t01_min50": (losses.ohem_cross_entropy, {"threshold": 0.1, "min_kept": 50}),
}
INPUTS = ("logits", "labels", "semantic_weights", "center_pred", "center_target", "offset_pred", "offset_target")


@pytest.fixture
def stored(shared) -> dict[str, torch.Tensor]:
    arrays = np.load(shared("fixtures/pixels/pdl_a_losses.npz"))
    tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "__meta__"}
    labels = tensors["labels"].long()
    return {**tensors, "labels": labels.where((labels >= 0) & (labels < tensors["logits"].shape[1]), IGNORE)}


def assert_agrees(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", SEMANTIC)
def test_semantic_losses_and_gradients_are_the_published_ones(stored, name, weighted):
    function, options = SEMANTIC[name]
    logits = stored["logits"].requires_grad_()
    loss = function(logits, stored["labels"], stored["semantic_weights"] if weighted else None, **options)
    loss.backward()
    key = f"{name}_{'w' if weighted else 'nw'}"
    assert_agrees(loss, stored[key])
    assert_agrees(logits.grad.norm(), stored[f"{key}_gradnorm"])


@pytest.mark.parametrize("state", ["normal", "zero_w"])
def test_the_total_is_the_published_one(stored, state):
    scale = float(state == "normal")
    centre_weights, offset_weights = (stored[f"{x}_weights"][:, None] * scale for x in ("center", "offset"))
    semantic = losses.top_k_cross_entropy(stored["logits"], stored["labels"], stored["semantic_weights"], 0.2)
    centre = 200 * losses.masked_squared_error(stored["center_pred"], stored["center_target"], centre_weights)
    offset = 0.01 * losses.masked_absolute_error(
        stored["offset_pred"], stored["offset_target"], offset_weights, per_channel=True
    )
    assert_agrees(semantic, stored[f"model_loss_Semantic_loss_{state}"])
    assert_agrees(centre, stored[f"model_loss_Center_loss_{state}"])
    assert_agrees(offset, stored[f"model_loss_Offset_loss_{state}"])
    assert_agrees(semantic + centre + offset, stored[f"model_loss_total_{state}"])
    assert_agrees(semantic + centre + offset, stored[f"model_loss_Loss_{state}"])


def test_every_stored_value_is_compared(stored):
    compared = {f"{name}_{w}{suffix}" for name in SEMANTIC for w in ("w", "nw") for suffix in ("", "_gradnorm")}
    terms = ("total", "Loss", "Semantic_loss", "Center_loss", "Offset_loss")
    compared |= {f"model_loss_{term}_{state}" for term in terms for state in ("normal", "zero_w")}
    assert set(stored) == compared | {*INPUTS, "center_weights", "offset_weights"}


def test_ignored_pixels_count_in_k_and_are_zeros():
    logits = torch.zeros(1, 2, 1, 10)  # every counted pixel costs log 2
    semantic = torch.full((1, 1, 10), IGNORE)
    semantic[..., 0] = 1
    log2 = float(np.log(2))
    assert float(losses.top_k_cross_entropy(logits, semantic, None, 0.2)) == pytest.approx(log2 / 2)
    assert float(losses.top_k_cross_entropy(logits, semantic, None, 1.0)) == pytest.approx(log2 / 10)
    assert float(losses.cross_entropy(logits, semantic)) == pytest.approx(log2)


def test_the_two_offset_normalisations_differ_by_two():
    prediction, target = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    weights = (torch.rand(2, 1, 3, 4) > 0.5).float()
    per_channel, per_pixel = (losses.masked_absolute_error(prediction, target, weights, x) for x in (True, False))
    torch.testing.assert_close(per_pixel, 2 * per_channel)


def test_ohem_keeps_hard_pixels_only():
    logits = torch.tensor([[4.0, -4.0], [4.0, 4.0]]).T.reshape(1, 2, 1, 2)  # sure, undecided
    semantic = torch.zeros(1, 1, 2, dtype=torch.int64)
    kept = losses.ohem_cross_entropy(logits, semantic, threshold=0.7, min_kept=1)
    assert float(kept) == pytest.approx(np.log(2))


def test_nothing_to_learn_from_is_zero_with_a_graph():
    semantic = torch.full((1, 4, 4), IGNORE)
    for function, options in SEMANTIC.values():
        logits = torch.randn(1, 3, 4, 4, requires_grad=True)
        loss = function(logits, semantic, torch.ones(1, 4, 4), **options)
        loss.backward()
        assert float(loss.detach()) == 0
        assert not logits.grad.any()
    nothing = torch.zeros(1, 1, 4, 4)
    for function in (
        lambda p: losses.masked_squared_error(p, torch.ones(1, 2, 4, 4), nothing),
        lambda p: losses.masked_absolute_error(p, torch.ones(1, 2, 4, 4), nothing, True),
        lambda p: losses.foreground_cross_entropy(p, torch.ones(1, 4, 4, dtype=torch.bool), nothing[0] > 0),
    ):
        prediction = torch.randn(1, 2, 4, 4, requires_grad=True)
        loss = function(prediction)
        loss.backward()
        assert float(loss.detach()) == 0
        assert not prediction.grad.any()


def test_foreground_counts_void_as_background_and_leaves_padding_out():
    logits = torch.tensor([[[[20.0, -20.0, 0.0, 30.0]]]])
    foreground = torch.tensor([[[True, False, False, False]]])
    valid = torch.tensor([[[True, True, True, False]]])  # the last pixel is padding, its error large
    assert float(losses.foreground_cross_entropy(logits, foreground, valid)) == pytest.approx(np.log(2) / 3, rel=1e-5)
    assert float(losses.foreground_cross_entropy(logits, foreground)) > 5
