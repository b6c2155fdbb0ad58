"""Colour operations against PIL's and OpenCV's definitions, and how the policies draw."""

from __future__ import annotations

import numpy as np
import pytest

from panoptic.transforms import colour, generator


def picture(height: int = 40, width: int = 52, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_ssd_colours_follow_their_definition() -> None:
    image = np.array([[[0, 100, 250], [40, 40, 40]]], np.uint8)
    assert colour.shift_brightness(image, 10.7).tolist() == [[[10, 110, 255], [50, 50, 50]]]
    assert colour.scale_contrast(image, 0.55).tolist() == [[[0, 55, 137], [22, 22, 22]]]
    assert colour.scale_saturation(image, 0.0)[0, 0].tolist() == [250, 250, 250]
    assert np.array_equal(colour.rotate_hue(image[:, 1:], 90), image[:, 1:])  # grey has no hue
    assert colour.rotate_hue(np.array([[[200, 0, 0]]], np.uint8), 60)[0, 0].tolist() == [0, 200, 0]
    names = [tuple(name for name, _ in colour.draw_ssd(generator(0, 0, k))) for k in range(400)]
    assert 0.4 < np.mean(["brightness" in n for n in names]) < 0.6
    full = {n for n in names if len(n) == 4}
    assert full == {("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast")}


def test_eomt_s_colours_are_torchvision_s_in_its_order() -> None:
    """Factors about 1, also of the brightness; half of SSD's turn of the hue."""
    import torch
    from torchvision.transforms.v2 import functional

    image = picture()
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())
    for name, value in (("brightness", 1.1), ("contrast", 0.6), ("saturation", 1.4), ("hue", -0.04)):
        expected = getattr(functional, f"adjust_{name}")(planes, value).numpy().transpose(1, 2, 0)
        changed = colour.apply(image, [(f"adjust_{name}", value)])
        assert np.array_equal(changed, expected) and not np.array_equal(changed, image), name
    drawn = [colour.draw_eomt(generator(0, 0, k)) for k in range(1000)]
    limits = {"brightness": (1 - 32 / 255, 1 + 32 / 255), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}
    for name, (low, high) in {**limits, "hue": (-0.05, 0.05)}.items():
        values = [value for operations in drawn for own, value in operations if own == f"adjust_{name}"]
        assert 0.45 < len(values) / len(drawn) < 0.55
        assert low <= min(values) < low + 0.02 * (high - low) and high - 0.02 * (high - low) < max(values) <= high
    orders = {tuple(name.removeprefix("adjust_") for name, _ in each) for each in drawn if len(each) == 4}
    assert orders == {("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast")}


@pytest.mark.parametrize("kind", ["Brightness", "Contrast", "Color"])
def test_colour004_is_what_pil_does(kind: str) -> None:
    image_enhance = pytest.importorskip("PIL.ImageEnhance")
    image = pytest.importorskip("PIL.Image")
    ours = {
        "Brightness": colour.enhance_brightness,
        "Contrast": colour.enhance_contrast,
        "Color": colour.enhance_saturation,
    }[kind]
    for seed, factor in enumerate([0.0, 0.5, 0.6180339, 0.9, 1.0, 1.1, 1.2345678, 1.5]):
        x = picture(seed=seed)
        expected = np.asarray(getattr(image_enhance, kind)(image.fromarray(x)).enhance(factor))
        assert np.array_equal(ours(x, factor), expected), factor


def test_the_neutral_value_changes_nothing() -> None:
    image = picture()
    neutral = {f"enhance_{kind}": 1.0 for kind in colour.ENHANCE} | {name: q[2] for name, q in colour.QUALITY.items()}
    for name, value in neutral.items():
        assert np.array_equal(colour.COLOUR[name](image, value), image), name


@pytest.mark.parametrize("name", sorted(colour.QUALITY))
def test_quality_degrades_more_at_the_far_end_and_replays(name: str) -> None:
    image = np.linspace(40, 215, 64)[:, None, None] + picture(64, 64) * 0.2
    image = np.clip(image, 0, 255).astype(np.uint8)
    low, high, neutral = colour.QUALITY[name]
    near, far = sorted((low, high), key=lambda value: abs(value - neutral))
    before = image.copy()
    changes = [np.abs(colour.COLOUR[name](image, v).astype(int) - image).mean() for v in (near, far)]
    assert 0 < changes[0] < changes[1] < 30 and np.array_equal(image, before)
    assert np.array_equal(colour.COLOUR[name](image, far), colour.COLOUR[name](image, far))


def test_colour004_draws_as_it_says() -> None:
    draws = [colour.draw_colour004(generator(0, 0, k)) for k in range(3000)]
    assert 0.47 < np.mean([bool(d) for d in draws]) < 0.53
    applied = [d for d in draws if d]
    shares = [np.mean([len(d) == n for d in applied]) for n in (1, 2, 3, 4)]
    assert np.allclose(shares, colour.COUNTS, atol=0.04)
    names = [name for d in applied for name, _ in d]
    kinds = ["quality" if name in colour.QUALITY else name.removeprefix("enhance_") for name in names]
    assert all(abs(kinds.count(kind) / len(kinds) - 0.25) < 0.03 for kind in (*colour.ENHANCE, "quality"))
    assert set(colour.QUALITY) <= set(names)
    assert all(len({name for name, _ in d}) == len(d) for d in applied)
    limits = {**{f"enhance_{k}": v for k, v in colour.ENHANCE.items()}, **{k: v[:2] for k, v in colour.QUALITY.items()}}
    for name, (low, high) in limits.items():
        values = np.array([v for d in applied for n, v in d if n == name])
        assert low <= values.min() and values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.08 * (high - low)
        assert abs(values.std() - (high - low) * 0.05**0.5) < 0.06 * (high - low)  # Beta(2, 2) has variance 1/20


def test_colour004_may_be_narrowed_and_weakened() -> None:
    rng = generator(1, 0, 0)
    for _ in range(50):
        drawn = colour.draw_colour004(rng, 1.0, ("contrast", "quality"), 0.5)
        assert 1 <= len(drawn) <= 2
        for name, value in drawn:
            assert name in {"enhance_contrast", *colour.QUALITY}
            assert name != "enhance_contrast" or 0.8 <= value <= 1.2
            assert name != "jpeg" or 65 <= value <= 95
    assert colour.draw_colour004(rng, 0.0) == []
    assert colour.draw_colour004(generator(0, 0, 1), 1.0) == colour.draw_colour004(generator(0, 0, 1), 1.0)
