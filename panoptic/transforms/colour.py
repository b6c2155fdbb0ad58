"""Colour augmentation: the operations on an image's colours, and the policies that draw them.

Every operation takes and gives uint8 [H, W, 3] RGB and never sees the map. Policies: SSD's, and that of
"Panoptic Segmentation" (research topic 12: brightness, saturation, contrast and pixel quality, chosen by a
probabilistic policy whose numbers it does not give; those here are a proposal). A third, EoMT's, is SSD's with
torchvision's operations.

All truncate to uint8. colour004's first three are PIL.ImageEnhance's to the bit; JPEG bytes depend on the build
of the codec, and with them an image by a few grey levels.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import cv2
import numpy as np

from panoptic.transforms.policies import Colour004

Operations = list[tuple[str, float]]
"""Names of `COLOUR` and their values, in the order in which they are applied."""


COUNTS = (0.5, 0.3, 0.15, 0.05)
"""Probabilities of one, two, three and four operations of colour004."""

ENHANCE: dict[str, tuple[float, float]] = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.5, 1.5)}
"""Range of each factor of colour004; 1 changes nothing."""

QUALITY: dict[str, tuple[float, float, float]] = {
    "jpeg": (30, 90, 100),
    "blur": (0.3, 1.5, 0),
    "shrink": (0.5, 0.9, 1),
    "noise": (2, 10, 0),
}
"""The four kinds of "pixel quality" of colour004: the range of each, and the value that changes nothing."""


def apply(image: np.ndarray, operations: Operations) -> np.ndarray:
    """The image after the operations, in their order."""
    for name, value in operations:
        image = COLOUR[name](image, value)
    return image


# Draws


def draw_ssd(rng: np.random.Generator) -> Operations:
    """SSD's policy (Mask2Former's COLOR_AUG_SSD): operations in order, with their values.

    Brightness first; then contrast before or after saturation and hue; each with probability 1/2.
    """
    ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5)}
    chosen = {name: float(rng.uniform(*limits)) for name, limits in ranges.items() if rng.integers(2)}
    if rng.integers(2):
        chosen["hue"] = float(rng.integers(-18, 19))
    late = ["contrast", "saturation", "hue"] if rng.integers(2) else ["saturation", "hue", "contrast"]
    return [(name, chosen[name]) for name in ["brightness", *late] if name in chosen]


def draw_eomt(rng: np.random.Generator) -> Operations:
    """EoMT's policy (specification eomt.md, section 9): operations in order, with their values.

    Brightness first, by a factor and not by grey levels; then contrast before or after saturation and hue; each with
    probability 1/2. The hue turns by up to 18 degrees of 360, half as far as SSD's.
    """
    ranges = {
        "brightness": (1 - 32 / 255, 1 + 32 / 255),
        "contrast": (0.5, 1.5),
        "saturation": (0.5, 1.5),
        "hue": (-18 / 360, 18 / 360),
    }
    chosen = {name: float(rng.uniform(*limits)) for name, limits in ranges.items() if rng.integers(2)}
    late = ["contrast", "saturation", "hue"] if rng.integers(2) else ["saturation", "hue", "contrast"]
    return [(f"adjust_{name}", chosen[name]) for name in ["brightness", *late] if name in chosen]


def draw_colour004(
    rng: np.random.Generator,
    chance: float = 0.5,
    kinds: Sequence[Colour004] = ("brightness", "saturation", "contrast", "quality"),
    strength: float = 1.0,
) -> Operations:
    """The operations of colour004, in order, with their values: one to four of `kinds`, each once, or none.

    Values are Beta(2, 2) over their range. Numbers are drawn in this order: whether anything is done, how many
    operations, which, then the value of each (before it the kind of quality).

    Args:
        chance: probability that there is any operation.
        strength: moves each value towards the one that changes nothing (below 1) or away from it.
    """
    applied = rng.random() < chance
    count = min(len(kinds), 1 + int(rng.choice(4, p=COUNTS)))
    operations: Operations = []
    for place in rng.permutation(len(kinds))[:count]:
        kind = kinds[place]
        name, limits = f"enhance_{kind}", (*ENHANCE.get(kind, (0, 0)), 1.0)
        if kind == "quality":
            name = sorted(QUALITY)[int(rng.integers(4))]
            limits = QUALITY[name]
        low, high, neutral = limits
        value = low + (high - low) * float(rng.beta(2, 2))
        operations.append((name, neutral + strength * (value - neutral)))
    return operations if applied else []


# SSD


def _table(scale: float, shift: float) -> np.ndarray:
    """uint8 [256] of x * scale + shift, clipped, then truncated as the reference does."""
    return np.clip(np.arange(256) * scale + shift, 0, 255).astype(np.uint8)


def shift_brightness(image: np.ndarray, delta: float) -> np.ndarray:
    """Add `delta` grey levels."""
    return cv2.LUT(image, _table(1, delta))


def scale_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply by `factor`."""
    return cv2.LUT(image, _table(factor, 0))


def scale_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the saturation of OpenCV's 8-bit HSV by `factor`."""
    same = np.arange(256, dtype=np.uint8)
    return _through_hsv(image, np.stack([same, _table(factor, 0), same], -1))


def rotate_hue(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turn the hue of OpenCV's 8-bit HSV by `degrees` of 180: a step is two degrees of the colour circle."""
    same = np.arange(256, dtype=np.uint8)
    turned = ((np.arange(256) + int(degrees)) % 180).astype(np.uint8)
    return _through_hsv(image, np.stack([turned, same, same], -1))


def _through_hsv(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replace hue, saturation and value by their entries in a table, uint8 [256, 3]."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    return cv2.cvtColor(cv2.LUT(hsv, table[None]), cv2.COLOR_HSV2RGB)


# torchvision


def _by_torchvision(operation: str) -> Callable[[np.ndarray, float], np.ndarray]:
    """An operation of torchvision on uint8 [H, W, 3]; it is imported where it is first used."""

    def adjust(image: np.ndarray, value: float) -> np.ndarray:
        import torch
        import torchvision.transforms.v2.functional as transforms

        planes = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        changed = getattr(transforms, operation)(planes, value)
        return np.ascontiguousarray(changed.numpy().transpose(1, 2, 0))

    return adjust


# colour004


def _blend(start: np.ndarray | int, image: np.ndarray, factor: float) -> np.ndarray:
    """start + factor * (image - start) in float32, clipped, truncated: PIL's blend."""
    start = np.asarray(start, np.float32)
    return np.clip(start + np.float32(factor) * (image.astype(np.float32) - start), 0, 255).astype(np.uint8)


def luma(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W]: PIL's integer form of 0.299 R + 0.587 G + 0.114 B."""
    red, green, blue = (image[..., k].astype(np.uint32) for k in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(np.uint8)


def enhance_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend black (factor 0) with the image (1), or beyond it."""
    return cv2.LUT(image, _blend(0, np.arange(256), factor))


def enhance_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend the image's mean grey (factor 0) with the image (1), or beyond it."""
    grey = int(luma(image).mean() + 0.5)
    return cv2.LUT(image, _blend(grey, np.arange(256), factor))


def enhance_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend the grey image (factor 0) with the image (1), or beyond it."""
    return _blend(luma(image)[..., None], image, factor)


def recompress(image: np.ndarray, quality: float) -> np.ndarray:
    """Compress as JPEG (4:2:0) at quality 0 to 100, and decode; 100 and above leave the image as it is."""
    if quality >= 100:
        return image
    options = [
        *(cv2.IMWRITE_JPEG_QUALITY, max(1, round(quality))),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
    ]
    _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    return cv2.cvtColor(np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)), cv2.COLOR_BGR2RGB)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blur by a Gaussian of `sigma` pixels; 0 leaves the image as it is."""
    return cv2.GaussianBlur(image, (0, 0), sigma) if sigma > 0 else image


def shrink(image: np.ndarray, factor: float) -> np.ndarray:
    """Resize bilinearly to that share of each side and back."""
    height, width = image.shape[:2]
    small = max(1, round(width * factor)), max(1, round(height * factor))
    if factor >= 1 or small == (width, height):
        return image
    return cv2.resize(cv2.resize(image, small), (width, height))


def add_noise(image: np.ndarray, sigma: float) -> np.ndarray:
    """Add Gaussian noise of deviation `sigma` in grey levels; sigma's bits seed it, so that sigma replays it."""
    if sigma <= 0:
        return image
    rng = np.random.default_rng(int.from_bytes(struct.pack("<d", sigma), "little"))
    return np.clip(image + sigma * rng.standard_normal(image.shape, np.float32), 0, 255).astype(np.uint8)


COLOUR: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "brightness": shift_brightness,
    "contrast": scale_contrast,
    "saturation": scale_saturation,
    "hue": rotate_hue,
    "enhance_brightness": enhance_brightness,
    "enhance_contrast": enhance_contrast,
    "enhance_saturation": enhance_saturation,
    "adjust_brightness": _by_torchvision("adjust_brightness"),
    "adjust_contrast": _by_torchvision("adjust_contrast"),
    "adjust_saturation": _by_torchvision("adjust_saturation"),
    "adjust_hue": _by_torchvision("adjust_hue"),
    "jpeg": recompress,
    "blur": blur,
    "shrink": shrink,
    "noise": add_noise,
}
"""Every operation by its name in `drawn`."""
