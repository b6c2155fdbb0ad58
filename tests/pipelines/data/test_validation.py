"""What a JPEG must have to count as whole: its own end marker, whatever stands before and behind it."""

from __future__ import annotations

import io
import time

import cv2
import numpy as np
import pytest
from PIL import Image as PIL

from panoptic.png import decode_image
from pipelines.data.validation import is_cut


def picture(height: int = 120, width: int = 160) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def jpeg(**options) -> bytes:
    buffer = io.BytesIO()
    PIL.fromarray(picture()).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def restarting() -> bytes:
    return cv2.imencode(".jpg", picture(), [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1].tobytes()


def with_thumbnail() -> bytes:
    """A whole JPEG inside a segment of another."""
    whole, small = jpeg(), jpeg(quality=20)
    return whole[:2] + b"\xff\xe1" + (2 + len(small)).to_bytes(2, "big") + small + whole[2:]


def with_comment() -> bytes:
    """The end marker in a comment between two scans of a progressive file."""
    whole = jpeg(progressive=True)
    scan = whole.index(b"\xff\xda", whole.index(b"\xff\xda") + 2)
    return whole[:scan] + b"\xff\xfe\x00\x06\xff\xd9\xff\xd8" + whole[scan:]


KINDS = {
    "plain": jpeg(),
    "progressive": jpeg(progressive=True, quality=95),
    "grey": cv2.imencode(".jpg", picture()[..., 0])[1].tobytes(),
    "restarts": restarting(),
    "thumbnail": with_thumbnail(),
    "comment": with_comment(),
    "filled": jpeg()[:-2] + b"\xff\xff\xff\xd9",
}
FILM = b"\x00\x00\x00\x18ftypmp42" + jpeg(progressive=True)[:-2] + b"\xff\xda\x00\x08\xff\xd8 and more"
"""As a phone puts behind a motion photo: here with all the markers that could mislead."""


@pytest.mark.parametrize("kind", KINDS)
def test_whole_files_are_whole_whatever_lies_behind_them(kind: str) -> None:
    data = KINDS[kind]
    for file in (data, data + b"\x00" * 9, data + FILM, data + jpeg()):
        assert not is_cut(file)
        assert decode_image(file).shape == (120, 160, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_files_are_cut_wherever_it_happened(kind: str) -> None:
    data = KINDS[kind]
    for end in {3, 4, 30, len(data) // 3, len(data) // 2, len(data) - 200, len(data) - 2, len(data) - 1}:
        assert is_cut(data[:end]), end
    assert is_cut(data[: len(data) // 2] + jpeg())  # what the next file holds does not end this one


def test_other_files_are_no_jpegs() -> None:
    assert not is_cut(b"\x89PNG") and not is_cut(b"") and not is_cut(b"\xff")
    assert is_cut(b"\xff\xd8") and is_cut(b"\xff\xd8\xff\xe0")


def test_it_costs_next_to_nothing() -> None:
    blurred = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8), (3, 3), 0)
    data = cv2.imencode(".jpg", blurred, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    assert len(data) > 150_000
    seconds = []
    for _ in range(20):
        mark = time.perf_counter()
        assert not is_cut(data + FILM)
        seconds.append(time.perf_counter() - mark)
    assert min(seconds) < 2e-3  # 0.1 ms; decoding takes 2 ms
