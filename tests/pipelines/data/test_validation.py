"""Image files: whether a JPEG is whole, photographs with an EXIF orientation, and those of 12 bits."""

from __future__ import annotations

import io
import time

import cv2
import numpy as np
import pytest
from PIL import Image as PIL

from panoptic.png import check_jpeg, decode_image
from panoptic.segmentation import Categories, Segmentation
from pipelines.data.readers.faults import Fault
from pipelines.data.validation import (
    ANIMATED,
    CMYK,
    GREY,
    SEVERAL_CROWDS,
    SIXTEEN_BITS,
    STORED_FRAME,
    STUFF_CROWD,
    STUFF_UNITED,
    TWELVE_BITS,
    UPRIGHT_FRAME,
    check_photograph,
    is_cut,
    sound_segments,
    without_exif,
)


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


def with_orientation(orientation: int, kind: str = "JPEG", height: int = 120, width: int = 160) -> bytes:
    """A photograph whose EXIF says how to turn it."""
    exif, buffer = PIL.Exif(), io.BytesIO()
    exif[274] = orientation
    pixels = cv2.GaussianBlur(picture(height, width), (9, 9), 0)
    PIL.fromarray(pixels).save(buffer, kind, exif=exif if kind == "TIFF" else exif.tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_maps_over_the_upright_image_fit(orientation: int, kind: str) -> None:
    data = with_orientation(orientation, kind)
    if orientation in (2, 3, 4):
        assert check_photograph(data, "a", (120, 160)) == (data, [UPRIGHT_FRAME])
    else:
        size = (160, 120) if orientation > 4 else (120, 160)
        assert check_photograph(data, "a", size) == (data, [])


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_maps_over_the_stored_pixels_free_the_jpeg_of_its_orientation(orientation: int) -> None:
    data = with_orientation(orientation)
    kept, repairs = check_photograph(data, "a", (120, 160))
    assert repairs == [STORED_FRAME]
    np.testing.assert_array_equal(decode_image(kept), decode_image(with_orientation(1)))
    kept, repairs = check_photograph(with_orientation(orientation, "PNG"), "a", (120, 160))
    assert repairs == [STORED_FRAME]
    np.testing.assert_array_equal(decode_image(kept), decode_image(with_orientation(1, "PNG")))


@pytest.mark.parametrize(("orientation", "side"), [(2, 160), (3, 160), (4, 160), (6, 120), (8, 120)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_where_sizes_do_not_tell_the_frame_the_data_set_does(orientation: int, side: int, kind: str) -> None:
    data, size = with_orientation(orientation, kind, 120, side), (120, side)
    assert check_photograph(data, "a", size, "applied") == (data, [UPRIGHT_FRAME])
    kept, repairs = check_photograph(data, "a", size, "stored")
    assert repairs == [STORED_FRAME]
    np.testing.assert_array_equal(decode_image(kept), decode_image(with_orientation(1, kind, 120, side)))


def test_sizes_that_fit_neither_frame_are_told_with_both() -> None:
    with pytest.raises(ValueError, match="cannot be removed from a file of this kind"):
        check_photograph(with_orientation(2, "TIFF"), "a", (120, 160), "stored")
    with pytest.raises(ValueError, match=r"map is 160x161 but the photograph 120x160, height"):
        check_photograph(with_orientation(6), "a", (160, 161))


def test_only_exif_is_removed() -> None:
    for data in (*KINDS.values(), b"\x89PNG\r\n", b""):
        assert without_exif(data) == data
    assert without_exif(with_orientation(6) + FILM) == without_exif(with_orientation(6)) + FILM


@pytest.mark.parametrize("kind", ["plain", "progressive", "grey", "restarts"])
def test_a_jpeg_is_refused_unread_as_it_is_when_it_is_read(kind: str) -> None:
    """The check computes no pixels; what is damaged must show all the same."""
    rng, verdicts = np.random.default_rng(3), set()
    for _ in range(120):
        data = bytearray(KINDS[kind])
        for place in rng.integers(2, len(data), 3):
            data[place] = rng.integers(256)
        accepted = []
        for read in (check_jpeg, decode_image):
            try:
                read(bytes(data))
                accepted.append(True)
            except ValueError:
                accepted.append(False)
        assert accepted[0] == accepted[1]
        verdicts.update(accepted)
    assert verdicts == {True, False}


def test_photographs_of_12_bits_are_counted() -> None:
    values = np.random.default_rng(0).integers(0, 4096, (12, 16, 3), np.uint16)
    data = cv2.imencode(".png", values)[1].tobytes()
    assert check_photograph(data, "a", (12, 16)) == (data, [TWELVE_BITS])


def test_files_without_an_image_are_refused() -> None:
    for data, message in (
        (b"", r"the image file is empty \(0 bytes\)"),
        (jpeg()[:-9], "JPEG ends before"),
        (jpeg(), "map is 120x161 but the photograph 120x160"),
    ):
        with pytest.raises(ValueError, match=message):
            check_photograph(data, "a", (120, 161))


def image_file(mode: str, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    pixels = PIL.fromarray(picture())
    if mode == "I;16":
        pixels = PIL.fromarray(picture()[..., 0].astype(np.uint16) * 257)
    else:
        pixels = pixels.convert(mode)
    pixels.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        (image_file("RGB", "JPEG"), []),
        (image_file("RGB", "PNG"), []),
        (image_file("L", "JPEG"), [GREY]),
        (image_file("L", "PNG"), [GREY]),
        (image_file("CMYK", "JPEG"), [CMYK]),
        (image_file("I;16", "PNG"), [SIXTEEN_BITS, GREY]),
        (image_file("RGB", "GIF", save_all=True, append_images=[PIL.new("RGB", (160, 120))]), [ANIMATED]),
        (image_file("RGB", "PNG", save_all=True, append_images=[PIL.new("RGB", (160, 120))]), [ANIMATED]),
    ],
)
def test_photographs_of_other_forms_are_read_as_rgb_and_counted(data: bytes, kinds: list[str]) -> None:
    kept, repairs = check_photograph(data, "x", (120, 160))
    assert kept == data and repairs == kinds
    assert decode_image(data).shape == (120, 160, 3)


def test_a_photograph_that_cannot_be_used_has_a_remedy() -> None:
    for data, size in ((b"", (120, 160)), (jpeg()[:-900], (120, 160)), (jpeg(), (120, 161))):
        with pytest.raises(Fault) as refused:
            check_photograph(data, "x", size)
        assert refused.value.remedy and refused.value.reason


def test_a_stuff_class_is_one_segment_and_no_crowd(small_categories: Categories) -> None:
    segments = np.array([[0, 1, 2, 3, 4, 5, 6]], np.int32)
    labels, crowd = np.array([1, 0, 1, 3, 2, 2]), np.array([True, False, True, False, True, True])
    truth, areas, repairs, warnings = sound_segments(Segmentation(segments, labels, crowd), small_categories)
    assert areas.tolist() == truth.areas().tolist() == [2, 1, 1, 1, 1]
    assert truth.segments.tolist() == [[0, 1, 2, 1, 3, 4, 5]] and truth.labels.tolist() == [1, 0, 3, 2, 2]
    assert truth.is_crowd().tolist() == [False, False, False, True, True]
    assert repairs == {STUFF_UNITED: 1, STUFF_CROWD: 2} and warnings == {SEVERAL_CROWDS: 1}
    sound = Segmentation(segments[:, :5], labels[[0, 1, 3, 4]], crowd[[1, 1, 1, 4]])
    kept = sound_segments(sound, small_categories, sound.areas())
    assert kept.segmentation is sound and not kept.repairs and not kept.warnings
