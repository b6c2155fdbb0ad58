"""Id maps and what programs get wrong when they write them: each kind is told apart, or repaired and counted."""

from __future__ import annotations

import io
import pickle

import cv2
import numpy as np
import pytest
from PIL import Image

from panoptic.png import encode_ids
from pipelines.data.readers import id_map
from pipelines.data.readers.faults import Fault
from pipelines.data.readers.id_map import read_ids, stands_in_bgr

IDS = np.zeros((60, 80), np.int64)
IDS[:30, :40], IDS[30:, :40], IDS[:, 60:] = 70_000, 300, 5


def record(*ids: int, **values: object) -> dict:
    return {"segments_info": [{"id": i, "category_id": 1 + k, **values} for k, i in enumerate(ids or (70_000, 300, 5))]}


def exchanged(ids: np.ndarray) -> bytes:
    """What cv2.imwrite makes of channels in the order red, green, blue."""
    channels = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)
    return cv2.imencode(".png", channels)[1].tobytes()


def image(pixels: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def test_a_sound_map_is_read_as_it_is() -> None:
    ids, kept, repairs, mismatches, *_ = read_ids(encode_ids(IDS), record())
    assert np.array_equal(ids, IDS) and kept == record() and not repairs and not mismatches
    assert read_ids(encode_ids(IDS), record(area=1199)).area_mismatches == 3
    assert stands_in_bgr(encode_ids(IDS), record()) is False


def test_boxes_are_counted_from_the_pixels_and_compared() -> None:
    regions = id_map.Regions.of(IDS)
    assert regions.pixels == {0: 1200, 5: 1200, 300: 1200, 70_000: 1200} and regions.boxes()[300] == [0, 30, 40, 30]
    rng = np.random.default_rng(0)
    for _ in range(20):
        ids = rng.integers(0, 4, (rng.integers(1, 9), rng.integers(1, 9))) * (rng.random() > 0.1)
        for value, (x, y, width, height) in id_map.Regions.of(ids).boxes().items():
            rows, columns = np.nonzero(ids == value)
            assert (x, y) == (columns.min(), rows.min())
            assert (width, height) == (columns.max() - x + 1, rows.max() - y + 1)
    for box, others in (([0, 30, 40, 30], 2), ([0, 31, 39, 29], 2), ([0, 28, 40, 30], 3), ([1, 2], 3), ("x", 3)):
        assert read_ids(encode_ids(IDS), record(bbox=box)).box_mismatches == others
    assert read_ids(encode_ids(IDS), record(bbox=None)).box_mismatches == 0


REFUSED = {
    "jpeg": (image(np.zeros((9, 9, 3), np.uint8), format="JPEG"), record(), "is a JPEG"),
    "8 bits": (encode_ids(IDS & 255), record(), "up to 70000: it was saved with 8 bits"),
    "unlisted": (encode_ids(IDS), record(70_000, 300), r"does not list: 5 \(1200 pixels\)"),
    "absent": (encode_ids(IDS), record(70_000, 300, 5, 7, area=4), "but the PNG does not hold: 7"),
    "two categories": (
        encode_ids(IDS),
        record(70_000, 300, 5, 300),
        "300 is listed twice, with the categories 2 and",
    ),
    "palette of other values": (image((IDS & 1).astype(np.uint8)), record(), "one channel of 8 bits"),
    "blue first": (exchanged(IDS), record(), "BGR order, those of other maps in RGB"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_repaired_is_refused_with_a_remedy(kind: str) -> None:
    png, entry, words = REFUSED[kind]
    with pytest.raises(Fault, match=words) as refused:
        read_ids(png, entry)
    again = pickle.loads(pickle.dumps(refused.value))
    assert refused.value.remedy and (again.reason, again.remedy) == (refused.value.reason, refused.value.remedy)


def test_a_map_that_was_resized_smoothly_or_went_through_a_jpeg() -> None:
    channels = np.stack([IDS & 255, IDS >> 8 & 255, IDS >> 16], -1).astype(np.uint8)
    smooth = cv2.resize(channels, (121, 91), interpolation=cv2.INTER_CUBIC)
    lossy = cv2.imdecode(cv2.imencode(".jpg", channels, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_UNCHANGED)
    for picture in (smooth, lossy):
        with pytest.raises(Fault, match=r"holds \d+ ids that the record does not list, most .*resized smoothly"):
            read_ids(image(picture), record())


def test_blue_first_in_every_map_is_repaired_and_in_some_refused() -> None:
    assert stands_in_bgr(exchanged(IDS), record()) is True
    ids, _, repairs, *_ = read_ids(exchanged(IDS), record(), bgr=True)
    assert np.array_equal(ids, IDS) and repairs == {id_map.BGR: 1}
    with pytest.raises(Fault, match="RGB order, those of other maps in BGR"):
        read_ids(encode_ids(IDS), record(), bgr=True)
    symmetric = np.where(IDS > 0, 65_537, 0)
    assert stands_in_bgr(encode_ids(symmetric), record(65_537)) is None
    assert np.array_equal(read_ids(encode_ids(symmetric), record(65_537), bgr=True).ids, symmetric)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_one_channel_whose_values_are_the_ids(mode: str) -> None:
    small = (IDS % 251).astype(np.uint8)
    picture = Image.fromarray(small)
    if mode == "P":
        picture.putpalette(list(range(256)) * 3)
        assert picture.mode == "P"
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    ids, _, repairs, *_ = read_ids(buffer.getvalue(), record(*np.unique(small[small > 0]).tolist()))
    assert np.array_equal(ids, small) and repairs == {id_map.ONE_CHANNEL: 1}


def test_entries_that_stand_for_nothing_are_left_out_and_counted() -> None:
    entry = record()
    entry["segments_info"] += [
        {"id": 0, "category_id": 9},
        {"id": 5, "category_id": 3, "iscrowd": 1},
    ]
    _, kept, repairs, *_ = read_ids(encode_ids(IDS), entry)
    assert [info["id"] for info in kept["segments_info"]] == [70_000, 300, 5]
    assert kept["segments_info"][2]["iscrowd"] == 0
    assert repairs == {id_map.VOID_LISTED: 1, id_map.REPEATED: 1}
    _, kept, repairs, *_ = read_ids(encode_ids(IDS), record(70_000, 300, 5, 8, area=7), covered=True)
    assert len(kept["segments_info"]) == 3 and repairs == {id_map.COVERED: 1}
