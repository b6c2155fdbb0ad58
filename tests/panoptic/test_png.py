"""The PNG codec and the reading of COCO-panoptic records, sound and broken."""

from __future__ import annotations

import copy
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from panoptic import png as module
from panoptic.png import (
    MAX_ID,
    MAX_JPEG,
    MAX_PIXELS,
    PNG_SIGNATURE,
    area_mismatches,
    decode_ids,
    decode_image,
    decode_segments,
    encode_ids,
    encode_jpeg,
    encode_segments,
    from_coco,
    holds_12_bits,
    image_size,
    silence_opencv,
    to_coco,
)
from panoptic.segmentation import Categories, Segmentation

SIZES = hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)


def encode(pixels: np.ndarray, extension: str = ".png") -> bytes:
    return cv2.imencode(extension, pixels)[1].tobytes()


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int32, SIZES, elements=st.integers(0, MAX_ID)))
def test_ids_survive_24_bits(ids: np.ndarray) -> None:
    back = decode_ids(encode_ids(ids))
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, ids)


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint8, (4, 5, 3)))
def test_ids_are_red_plus_256_green_plus_65536_blue(rgb: np.ndarray) -> None:
    expected = rgb.astype(np.int64) @ [1, 256, 65536]
    np.testing.assert_array_equal(decode_ids(encode(rgb[..., ::-1])), expected)
    alpha = np.full((4, 5, 1), 7, np.uint8)
    np.testing.assert_array_equal(decode_ids(encode(np.concatenate([rgb[..., ::-1], alpha], 2))), expected)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([1, 255, 256, 65535]).flatmap(lambda n: hnp.arrays(np.int32, SIZES, elements=st.integers(0, n))))
def test_segments_survive_in_8_or_16_bits(segments: np.ndarray) -> None:
    png = encode_segments(segments)
    assert png[24] == (8 if segments.max() < 256 else 16)
    back = decode_segments(png)
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back, segments)


def adam7(pixels: np.ndarray) -> bytes:
    """An interlaced PNG of uint8 [H, W] or [H, W, 3], without filters."""
    height, width = pixels.shape[:2]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = [pixels[y::down, x::right] for x, y, right, down in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return PNG_SIGNATURE + b"".join(packed)


@pytest.mark.parametrize("library", ["kornia-rs", "OpenCV"])
def test_both_libraries_read_the_same_maps(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "OpenCV":
        monkeypatch.setattr(module, "compiled", None)
    elif module.compiled is None:
        pytest.skip("kornia-rs is not installed (extra `fast`)")
    else:  # OpenCV must not stand in for it
        monkeypatch.setattr(module, "_decode", None)
    rgb = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    ids = rgb.astype(np.int32) @ [1, 256, 65536]
    for kind in ("RGB", "RGBA"):
        with io.BytesIO() as file:
            Image.fromarray(rgb).convert(kind).save(file, "PNG")
            np.testing.assert_array_equal(decode_ids(file.getvalue()), ids)
    with io.BytesIO() as file:  # a colour that stands for "transparent" is an id like any other
        Image.fromarray(rgb).save(file, "PNG", transparency=tuple(rgb[0, 0].tolist()))
        np.testing.assert_array_equal(decode_ids(file.getvalue()), ids)
    np.testing.assert_array_equal(decode_ids(adam7(rgb)), ids)
    for segments in (ids % 256, ids % 65536):
        back = decode_segments(encode_segments(segments))
        assert back.dtype == np.int32 and back.flags.writeable
        np.testing.assert_array_equal(back, segments)
    np.testing.assert_array_equal(decode_segments(adam7(rgb[..., 0])), rgb[..., 0])


def test_what_the_compiled_reader_refuses_is_read_or_refused_by_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> np.ndarray:
        raise Exception("unknown chunk")

    monkeypatch.setattr(module, "compiled", SimpleNamespace(decode_image_png_u8=refuse, decode_image_png_u16=refuse))
    ids = np.arange(20).reshape(4, 5) * 70_000
    np.testing.assert_array_equal(decode_ids(encode_ids(ids)), ids)
    np.testing.assert_array_equal(decode_segments(encode_segments(ids // 70)), ids // 70)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_ids(encode_ids(ids)[:-20])


def test_segments_are_stored_without_filters() -> None:
    segments = np.add.outer(np.arange(64) // 9, np.arange(80) // 11)
    data = encode_segments(segments)
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start])
    rows = np.frombuffer(zlib.decompress(data[start + 4 : start + 4 + length]), np.uint8).reshape(64, 81)
    np.testing.assert_array_equal(rows[:, 0], 0)
    np.testing.assert_array_equal(rows[:, 1:], segments)


def test_encoding_takes_views_and_any_integer_type() -> None:
    ids = np.arange(24, dtype=np.int64).reshape(4, 6) * 70000
    np.testing.assert_array_equal(decode_ids(encode_ids(ids[::-1, ::2])), ids[::-1, ::2])
    segments = (ids // 70000).T
    np.testing.assert_array_equal(decode_segments(encode_segments(segments)), segments)


@pytest.mark.parametrize(("values", "writer"), [((0, MAX_ID + 1), encode_ids), ((0, 65536), encode_segments)])
def test_values_out_of_range_are_refused(values: tuple[int, int], writer: Callable[[np.ndarray], bytes]) -> None:
    with pytest.raises(ValueError, match=f"from 0 to {values[1]}"):
        writer(np.array([values]))
    with pytest.raises(ValueError, match="from -1 to 0"):
        writer(np.array([[-1, 0]]))


def test_pixel_formats_that_hold_no_ids_are_refused() -> None:
    grey = encode(np.zeros((2, 2), np.uint8))
    deep = encode(np.zeros((2, 2, 3), np.uint16))
    for png, words in ((grey, "8-bit greyscale"), (deep, "16-bit RGB")):
        with pytest.raises(ValueError, match=words):
            decode_ids(png)
    palette = grey[:25] + b"\x03" + grey[26:]
    with pytest.raises(ValueError, match="palette"):
        decode_ids(palette)
    with pytest.raises(ValueError, match=r"RGB PNG is no segment map.*decode_ids"):
        decode_segments(encode_ids(np.zeros((2, 2), np.int32)))


@pytest.mark.parametrize("reader", [decode_ids, decode_segments, decode_image])
@pytest.mark.parametrize("data", [b"", b"no image at all, but long enough to have a header"])
def test_rubbish_is_refused(reader: Callable[[bytes], np.ndarray], data: bytes) -> None:
    with pytest.raises(ValueError, match=r"PNG|decoded|empty"):
        reader(data)


def test_a_header_without_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_ids(encode_ids(np.ones((30, 30), np.int32))[:40])
    with pytest.raises(ValueError, match=r"^a\.jpg: cannot be decoded"):
        decode_image(b"\xff\xd8\xff\xe0", "a.jpg")


def png_bomb(height: int, width: int, colour: int = 2) -> bytes:
    """A PNG of a few kilobytes that states a picture of this size; its rows are zeros that end early."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb(height: int, width: int) -> bytes:
    """A small JPEG whose frame header states a picture of this size."""
    data = encode(np.zeros((8, 8, 3), np.uint8), ".jpg")
    place = data.index(b"\xff\xc0")
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


@pytest.fixture
def undecoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV is not asked."""
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))


@pytest.mark.usefixtures("undecoded")
def test_a_picture_that_states_too_much_is_refused_undecoded() -> None:
    for data, words in (
        (png_bomb(30000, 30000), "30000x30000"),
        (png_bomb(0xFFFFFFFF, 2), "4294967295x2"),
        (jpeg_bomb(65000, 64000), "65000x64000"),
    ):
        assert len(data) < 5000
        with pytest.raises(ValueError, match=rf"^a: its header says {words} pixels.*up to {MAX_PIXELS} pixels are"):
            decode_image(data, "a")
    for reader in (decode_ids, lambda png: decode_segments(png_bomb(30000, 30000, 0))):
        with pytest.raises(ValueError, match="30000x30000 pixels"):
            reader(png_bomb(30000, 30000))
    bmp = bytearray(encode(np.zeros((4, 4, 3), np.uint8), ".bmp"))
    bmp[18:26] = struct.pack("<ii", 30000, 30000)
    with pytest.raises(ValueError, match=r"^a: its header says more"):
        decode_image(bytes(bmp), "a")
    with pytest.raises(ValueError, match=r"^a: its header says 0x3 pixels"):
        decode_image(png_bomb(0, 3), "a")


@pytest.mark.usefixtures("undecoded")
def test_a_picture_of_another_size_than_its_record_is_refused_undecoded(small_categories: Categories) -> None:
    for data in (png_bomb(9000, 9000), jpeg_bomb(9000, 9000)):
        with pytest.raises(ValueError, match=r"^a: the image is 9000x9000 but the record says 3x4"):
            decode_image(data, "a", (3, 4))
    with pytest.raises(ValueError, match=r"^the map is 9000x9000 but the record says 3x4"):
        decode_segments(png_bomb(9000, 9000, 0), (3, 4))
    with pytest.raises(ValueError, match=r"^a: the PNG is 9000x9000 but the image is 3x4"):
        from_coco(png_bomb(9000, 9000), {"segments_info": []}, small_categories, "a", (3, 4))


def test_sizes_are_read_from_the_header() -> None:
    pixels = np.zeros((5, 7, 3), np.uint8)
    for suffix in (".png", ".jpg", ".bmp", ".tiff", ".webp"):
        assert image_size(encode(pixels, suffix)) == (5, 7), suffix
    progressive = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    comment = progressive[:2] + b"\xff\xfe\x00\x08\xff\xc0\x00\x01\x02\x03" + progressive[2:]
    assert image_size(progressive) == image_size(comment) == (5, 7)
    assert decode_image(comment, "a", (5, 7)).shape == (5, 7, 3)
    with pytest.raises(ValueError, match=r"^a\.jpg: the file is empty \(0 bytes\)"):
        image_size(b"", "a.jpg")


def test_a_picture_that_exif_turns_fits_its_record() -> None:
    """The record has the size as it is shown, the header the size as it is stored."""
    stored = encode(np.zeros((5, 7, 3), np.uint8), ".jpg")
    tiff = b"II*\x00\x08\x00\x00\x00" + struct.pack("<HHHIHHI", 1, 0x112, 3, 1, 6, 0, 0)
    exif = b"Exif\x00\x00" + tiff
    turned = stored[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + stored[2:]
    assert decode_image(turned, "a", (7, 5)).shape == (7, 5, 3)


def test_images_of_every_kind_become_rgb() -> None:
    bgr = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    rgb = bgr[..., ::-1]
    np.testing.assert_array_equal(decode_image(encode(bgr)), rgb)
    with_alpha = np.concatenate([bgr, np.full((5, 7, 1), 9, np.uint8)], 2)
    np.testing.assert_array_equal(decode_image(encode(with_alpha)), rgb)
    np.testing.assert_array_equal(decode_image(encode(bgr.astype(np.uint16) * 257)), rgb)
    grey = decode_image(encode(bgr[..., 0]))
    np.testing.assert_array_equal(grey, np.repeat(bgr[..., :1], 3, 2))
    flat = decode_image(encode(np.full((16, 16, 3), (200, 90, 30), np.uint8), ".jpg"))
    assert flat.dtype == np.uint8
    np.testing.assert_allclose(flat[8, 8], (30, 90, 200), atol=4)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_photographs_of_12_bits_keep_their_levels(suffix: str) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (20, 30, 3), np.uint16)
    values[0, 0] = (0, 2000, 4095)
    data = encode(values, suffix)
    assert holds_12_bits(data)
    np.testing.assert_array_equal(decode_image(data), values[..., ::-1] >> 4)
    values[0, 0, 0] = 4096  # no 12-bit camera gives that
    data = encode(values, suffix)
    assert not holds_12_bits(data) and decode_image(data).max() == 16
    assert not holds_12_bits(encode(np.zeros((4, 5, 3), np.uint16), suffix))
    assert not holds_12_bits(encode(np.full((4, 5, 3), 3, np.uint8), suffix))


def test_pictures_become_jpegs_unless_they_are_too_large() -> None:
    picture = np.full((16, 24, 3), (200, 90, 30), np.uint8)
    np.testing.assert_allclose(decode_image(encode_jpeg(picture, 90)), picture, atol=4)
    assert decode_image(encode_jpeg(np.zeros((1, MAX_JPEG, 3), np.uint8), 50)).shape == (1, MAX_JPEG, 3)
    with pytest.raises(ValueError, match=r"1x65501 pixels is too large for a JPEG \(up to 65500\)"):
        encode_jpeg(np.zeros((1, MAX_JPEG + 1, 3), np.uint8), 50)


def test_opencv_says_nothing_about_broken_files(capfd: pytest.CaptureFixture[str]) -> None:
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_WARNING)  # as it is at first
    silence_opencv()
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_image(encode(np.zeros((60, 60, 3), np.uint8))[:60])
    assert "WARN" not in capfd.readouterr().err


@pytest.fixture
def sound(small_categories: Categories) -> tuple[bytes, dict, Segmentation]:
    """The segments 300 (a car), 70000 (sky) and 5 (a crowd of dogs), beside one void pixel."""
    ids = np.array([[300, 300, 70000], [0, 5, 70000]])
    infos = [
        {"id": 300, "category_id": 3, "iscrowd": 0, "area": 2},
        {"id": 70000, "category_id": 7, "iscrowd": 0, "area": 2},
        {"id": 5, "category_id": 18, "iscrowd": 1, "area": 4000},
    ]
    truth = Segmentation(
        np.array([[1, 1, 2], [0, 3, 2]], np.int32), np.array([2, 1, 4]), np.array([False, False, True])
    )
    return encode_ids(ids), {"image_id": 1, "file_name": "a.png", "segments_info": infos}, truth


def test_a_record_is_read_in_its_own_order(
    sound: tuple[bytes, dict, Segmentation], small_categories: Categories
) -> None:
    png, record, expected = sound
    truth = from_coco(png, record, small_categories, "a.png", size=(2, 3))
    np.testing.assert_array_equal(truth.segments, expected.segments)
    np.testing.assert_array_equal(truth.labels, expected.labels)
    np.testing.assert_array_equal(truth.crowd, expected.crowd)
    assert truth.scores is None
    assert truth.areas().tolist() == [2, 2, 1]  # not the 4000 of the record
    assert area_mismatches(truth, record) == [(5, 4000, 1)]


def test_numbers_and_flags_of_a_record_may_be_text(
    sound: tuple[bytes, dict, Segmentation], small_categories: Categories
) -> None:
    png, record, expected = sound
    texts = ("0", "false") if expected.crowd is None else [("false", "true")[int(crowd)] for crowd in expected.crowd]
    for info, text in zip(record["segments_info"], texts, strict=True):
        info.update(id=str(info["id"]), category_id=float(info["category_id"]), iscrowd=text, area=None)
    truth = from_coco(png, record, small_categories, "a.png")
    np.testing.assert_array_equal(truth.segments, expected.segments)
    np.testing.assert_array_equal(truth.labels, expected.labels)
    np.testing.assert_array_equal(truth.crowd, expected.crowd)
    assert area_mismatches(truth, record) == []


def test_scores_are_read_where_every_segment_has_one(
    sound: tuple[bytes, dict, Segmentation], small_categories: Categories
) -> None:
    png, record, _ = sound
    for k, info in enumerate(record["segments_info"]):
        info["score"] = k / 4
    scores = from_coco(png, record, small_categories, "a.png").scores
    assert scores is not None
    assert scores.tolist() == [0.0, 0.25, 0.5]
    del record["segments_info"][0]["score"]
    assert from_coco(png, record, small_categories, "a.png").scores is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda infos: infos.pop(1), "PNG that the record does not list: 70000"),
        (lambda infos: infos.append({"id": 9, "category_id": 7}), "the PNG does not hold: 9"),
        (lambda infos: infos.append(dict(infos[0])), "more than once: 300"),
        (lambda infos: infos[0].update(category_id=55), "segment 300 has the category 55"),
        (lambda infos: infos[2].pop("category_id"), r"segments_info\[2\] has no category_id"),
        (lambda infos: infos.append({"id": 0, "category_id": 7}), r"segments_info\[3\] has the id 0"),
        (lambda infos: infos.append({"id": MAX_ID + 1, "category_id": 7}), "the id 16777216"),
        (lambda infos: infos.append({"id": "x7", "category_id": 7}), "the id 'x7'"),
        (lambda infos: infos.append({"id": 7.5, "category_id": 7}), "the id 7.5"),
        (lambda infos: infos.append({"id": True, "category_id": 7}), "the id true"),
        (lambda infos: infos[0].update(category_id=[7]), r"segment 300 has the category \[7\]"),
        (lambda infos: infos[0].update(category_id=None), r"segment 300 has the category null"),
        (lambda infos: infos[1].update(iscrowd="no"), r"segments_info\[1\]\.iscrowd is 'no'; it must be 0 or 1"),
        (lambda infos: infos[1].update(score="high"), r"segments_info\[1\]\.score is 'high'; it must be a number"),
        (lambda infos: infos.append(None), r"segments_info\[3\] is null"),
        (lambda infos: infos.append({"category_id": 7}), r"segments_info\[3\] has no id"),
    ],
)
def test_a_broken_record_is_refused_with_its_reason(
    sound: tuple[bytes, dict, Segmentation],
    small_categories: Categories,
    change: Callable[[list[dict]], object],
    words: str,
) -> None:
    png, record, _ = sound
    record = copy.deepcopy(record)
    change(record["segments_info"])
    with pytest.raises(ValueError, match=rf"^maps/a\.png: .*{words}"):
        from_coco(png, record, small_categories, "maps/a.png")


def test_every_problem_of_a_file_is_listed_at_once(
    sound: tuple[bytes, dict, Segmentation], small_categories: Categories
) -> None:
    png, record, _ = sound
    infos = record["segments_info"]
    infos[0]["category_id"] = 55
    infos[1]["id"] = 8
    with pytest.raises(ValueError) as caught:
        from_coco(png, record, small_categories, "a.png", size=(3, 2))
    message = str(caught.value)
    for words in ("category 55", "2x3 but the image is 3x2", "not list: 70000", "not hold: 8"):
        assert words in message
    with pytest.raises(ValueError, match=r"a\.png: the record has segments_info 'none'; each annotation"):
        from_coco(png, {"segments_info": "none"}, small_categories, "a.png")
    with pytest.raises(ValueError, match=r"a\.png: the record has no segments_info"):
        from_coco(png, {}, small_categories, "a.png")
    with pytest.raises(ValueError, match=r"a\.png: not a PNG"):
        from_coco(b"GIF89a", record, small_categories, "a.png")


def test_many_strange_ids_are_not_all_spelt_out(small_categories: Categories) -> None:
    with pytest.raises(ValueError, match=r"1, 2, 3, 4, 5, 6, 7, 8 and 12 more$"):
        from_coco(encode_ids(np.arange(21)[None]), {"segments_info": []}, small_categories, "a.png")


@pytest.mark.parametrize("seed", range(5))
def test_export_and_import_are_inverse(
    seed: int, small_categories: Categories, random_segmentation: Callable[..., Segmentation]
) -> None:
    truth = random_segmentation(np.random.default_rng(seed), 24, 31, small_categories, crowd=True)
    png, record = to_coco(truth, small_categories, 12, "a.png")
    assert json.loads(json.dumps(record)) == record  # no NumPy number slips in
    back = from_coco(png, record, small_categories, "a.png", truth.size)
    np.testing.assert_array_equal(back.segments, truth.segments)
    np.testing.assert_array_equal(back.labels, truth.labels)
    np.testing.assert_array_equal(back.is_crowd(), truth.is_crowd())
    assert area_mismatches(back, record) == []
    for k, info in enumerate(record["segments_info"]):
        rows, columns = np.nonzero(truth.segments == k + 1)
        x, y, width, height = info["bbox"]
        assert (x, y, x + width - 1, y + height - 1) == (columns.min(), rows.min(), columns.max(), rows.max())


def test_export_leaves_out_segments_without_a_pixel_and_keeps_scores(small_categories: Categories) -> None:
    prediction = Segmentation(
        np.array([[3, 1]], np.int32), np.array([0, 1, 2]), scores=np.array([0.5, 0.25, 0.75], np.float32)
    )
    png, record = to_coco(prediction, small_categories, "x", "a.png")
    np.testing.assert_array_equal(decode_ids(png), [[2, 1]])
    rows = [(info["id"], info["category_id"], info["score"]) for info in record["segments_info"]]
    assert rows == [(1, 24, 0.5), (2, 3, 0.75)]
    assert (record["image_id"], record["file_name"]) == ("x", "a.png")


def test_an_empty_map_is_exported(small_categories: Categories) -> None:
    png, record = to_coco(Segmentation(np.zeros((2, 2), np.int32), np.zeros(0, np.int64)), small_categories, 1, "a.png")
    assert record["segments_info"] == []
    assert from_coco(png, record, small_categories, "a.png").labels.shape == (0,)


def test_official_coco_files_are_read_and_written_back(shared: Callable[[str], Path]) -> None:
    root = shared("data/coco_sample/annotations")
    dataset = json.loads((root / "panoptic_sample.json").read_text())
    categories = Categories.from_coco(dataset["categories"])
    sizes = {image["id"]: (image["height"], image["width"]) for image in dataset["images"]}
    for record in dataset["annotations"]:
        png = (root / "panoptic_sample" / record["file_name"]).read_bytes()
        truth = from_coco(png, record, categories, record["file_name"], sizes[record["image_id"]])
        assert area_mismatches(truth, record) == []
        _, written = to_coco(truth, categories, record["image_id"], record["file_name"])
        for ours, theirs in zip(written["segments_info"], record["segments_info"], strict=True):
            assert {k: ours[k] for k in ("category_id", "area", "iscrowd")} == {
                k: theirs[k] for k in ("category_id", "area", "iscrowd")
            }
        np.testing.assert_array_equal(decode_segments(encode_segments(truth.segments)), truth.segments)
