"""The references' training views: exact sizes, crops within their rules, image and map aligned, draws that repeat.

Shapes: H x W pixels.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from panoptic.ranges import check_ranges
from panoptic.segmentation import Sample, Segmentation, collate
from panoptic.transforms import POLICIES, Augment, Resize, copy_generator, evaluation_view, generator, training_view
from panoptic.transforms.colour import apply
from panoptic.transforms.geometry import UNLIMITED, SizeRule, jitter_size, ratio_size, short_side_size

# width x height, (short, longest); then (h, w) of DETR, Hugging Face, the same with size_divisor 32, detectron2
SIZES = [
    ((640, 480), (800, 1333), (800, 1066), (800, 1066), (800, 1088), (800, 1067)),
    ((2048, 1024), (800, 1333), (666, 1332), (666, 1333), (672, 1344), (667, 1333)),
    ((2048, 1024), (400, 400), (200, 400), (200, 400), (224, 416), (200, 400)),
    ((2048, 1024), (700, 700), (350, 700), (350, 700), (352, 704), (350, 700)),
    ((2048, 1024), (1024, 2048), (1024, 2048), (1024, 2048), (1024, 2048), (1024, 2048)),
    ((500, 375), (480, 1333), (480, 640), (480, 640), (480, 640), (480, 640)),
    ((427, 640), (672, 1333), (1007, 672), (1007, 672), (1024, 672), (1007, 672)),
    ((640, 427), (800, 1333), (800, 1199), (800, 1199), (800, 1216), (800, 1199)),
    ((1024, 2048), (400, 400), (400, 200), (400, 200), (416, 224), (400, 200)),
    ((333, 500), (600, 1000), (900, 600), (900, 600), (928, 608), (901, 600)),
]
RULES: tuple[SizeRule, ...] = ("detr", "huggingface", "huggingface32", "detectron2")


def test_ties_of_the_capped_side_are_those_of_detectron2() -> None:
    """Its arithmetic step by step: the short side is set, not multiplied."""
    for height, width, short, longest in ((300, 600, 672, 1333), (289, 612, 400, 666), (480, 640, 800, 1333)):
        sides = {"h": short * 1.0, "w": short / height * width}
        if sides["w"] > longest:
            factor = longest / sides["w"]
            sides = {name: side * factor for name, side in sides.items()}
        expected = int(sides["h"] + 0.5), int(sides["w"] + 0.5)
        assert short_side_size((height, width), short, longest) == expected
        assert short_side_size((width, height), short, longest) == expected[::-1]
    assert short_side_size((300, 600), 672, 1333) == (666, 1333)


@pytest.mark.parametrize("row", SIZES, ids=lambda row: f"{row[0][0]}x{row[0][1]}-{row[1][0]}")
def test_the_references_sizes(row: tuple) -> None:
    (width, height), (short, longest), *expected = row
    for rule, size in zip(RULES, expected, strict=True):
        assert short_side_size((height, width), short, longest, rule) == size, rule
        augment = Augment(scale="short", sides=(short,), longest=longest, rule=rule, flip=0.0)
        small = Sample(np.zeros((height, width, 3), np.uint8), blank(height, width), "blank")
        assert training_view(small, augment, generator(0, 0, 0)).truth.size == size
        assert evaluation_view(small, Resize(short=short, longest=longest, rule=rule)).truth.size == size


def blank(height: int, width: int) -> Segmentation:
    return Segmentation(np.ones((height, width), np.int32), np.zeros(1, np.int64))


def tiles(height: int, width: int, side: int = 40) -> Sample:
    """Segment k is painted (k, 255 - k, 7 k mod 256): a pixel's colour tells its segment where nothing blends."""
    rows, columns = np.mgrid[:height, :width]
    segments = (1 + rows // side * (-(-width // side)) + columns // side).astype(np.int32)
    count = int(segments.max())
    image = np.stack([segments, 255 - segments, 7 * segments % 256], -1).astype(np.uint8)
    return Sample(image, Segmentation(segments, np.arange(count, dtype=np.int64)), "tiles")


@pytest.mark.parametrize("name", ["none", "detr", "lsj", "eomt", "cityscapes_m2f", "efficientps"])
def test_image_and_map_stay_aligned(name: str) -> None:
    sample, augment = tiles(300, 420), replace(POLICIES[name], colour="none")
    for epoch in range(4):
        view = training_view(sample, augment, generator(0, epoch, 0))
        number = np.concatenate([[0], view.truth.labels + 1])[view.truth.segments].astype(np.float32)
        kernel = np.ones((9, 9), np.uint8)
        plane = cv2.copyMakeBorder(number, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=-1)
        inside = (cv2.erode(plane, kernel) == cv2.dilate(plane, kernel))[4:-4, 4:-4] & (view.truth.segments > 0)
        assert inside.any() and view.image.shape[:2] == view.truth.size
        assert np.abs(view.image[..., 0][inside] - number[inside]).max() <= 1
        assert np.abs(255.0 - view.image[..., 1][inside] - number[inside]).max() <= 1
        again = training_view(sample, augment, generator(0, epoch, 0))
        assert np.array_equal(view.image, again.image) and dict(view.drawn) == dict(again.drawn)


def test_large_scale_jitter_is_always_one_size_and_padded_at_the_end() -> None:
    augment = POLICIES["lsj"]
    seen = set()
    for epoch in range(12):
        view = training_view(tiles(300, 420), augment, generator(2, epoch, 0))
        assert view.image.shape == (1024, 1024, 3)
        height, width = int(view.drawn["height"]), int(view.drawn["width"])
        assert abs(height - 300 * width / 420) <= 1 and 102 <= width <= 2048
        if width < 1024:
            assert (view.image[:, width:] == 128).all() and (view.image[height:] == 128).all()
            assert not view.truth.segments[:, width:].any() and not view.truth.segments[height:].any()
            assert view.truth.segments[:height, :width].all()
            seen.add(("padded", view.drawn["flip"]))
        else:
            spare = max(0, height - 1024), width - 1024
            share = view.drawn["left"] / max(1, spare[1])
            assert abs(view.drawn["top"] - share * spare[0]) <= 1
            seen.add(("cropped", view.drawn["flip"]))
    assert {kind for kind, _ in seen} == {"padded", "cropped"} and ("padded", 1.0) in seen


def test_eomt_s_view_is_a_black_square_with_the_image_at_any_place() -> None:
    """Flip, jitter of sides from a tenth to twice the square, black padding at the end, a crop with a free corner."""
    augment = POLICIES["eomt"]
    seen, apart = set(), False
    for epoch in range(24):
        view = training_view(tiles(300, 420), augment, generator(3, epoch, 0))
        assert view.image.shape == (640, 640, 3) and view.truth.size == (640, 640)
        height, width, top, left = (int(view.drawn[name]) for name in ("height", "width", "top", "left"))
        assert 64 <= width <= 1280 and height in {int(300 * width / 420), int(300 * (width + 0.9999) / 420)}
        if width < 640:
            assert not view.image[:, width:].any() and not view.image[height:].any() and (top, left) == (0, 0)
            assert view.truth.segments[:height, :width].all() and not view.truth.segments[height:].any()
            seen.add(("padded", view.drawn["flip"]))
        else:
            apart |= abs(top - left * max(0, height - 640) / max(1, width - 640)) > 20
            seen.add(("cropped", view.drawn["flip"]))
    assert len(seen) == 4 and apart  # both ways round, and no corner on the diagonal as with large-scale jitter


def test_eomt_s_sizes_are_torchvision_s_and_pil_s(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from torchvision.transforms.v2 import ScaleJitter

    theirs = ScaleJitter((640, 640), (0.1, 2.0))
    rng = np.random.default_rng(0)
    for height, width in rng.integers(40, 2000, (200, 2)).tolist():
        share = torch.rand(1)
        monkeypatch.setattr(torch, "rand", lambda *_, share=share: share)
        expected = theirs.make_params([torch.zeros(3, 1, 1).expand(3, height, width)])["size"]
        monkeypatch.undo()
        assert jitter_size((height, width), (640, 640), 0.1 + 1.9 * float(share), truncate=True) == tuple(expected)
        factor = min(640 / height, 640 / width)
        assert short_side_size((height, width), 640, 640, "half_even") == (
            round(height * factor),
            round(width * factor),
        )
    assert short_side_size((1280, 1061), 640, 640, "half_even") == (640, 530)
    assert short_side_size((1280, 1061), 640, 640) == (640, 531)
    view = evaluation_view(tiles(1280, 1061), Resize(short=640, longest=640, rule="half_even", antialias=True))
    assert view.image.shape == (640, 530, 3)
    images, targets = collate([view], divisor=640)  # what batches are padded to, in black
    assert tuple(images.shape[-2:]) == (640, 640) and not images[..., 530:].any()
    assert targets.frame.sizes.tolist() == [[640, 530]]


def test_eomt_s_colours_see_the_whole_image() -> None:
    """The mean grey of the contrast is that of the image, whatever part of it the crop leaves."""
    sample = tiles(100, 100, 50)
    sample = replace(
        sample, image=np.repeat(np.linspace(0, 255, 100).astype(np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    )
    augment = Augment(colour="eomt", crop=(20, 20), flip=0.0)
    compared = 0
    for epoch in range(40):
        view = training_view(sample, augment, generator(4, epoch, 0))
        values = [(name.removeprefix("colour/"), value) for name, value in view.drawn.items() if "colour/" in name]
        top, left = int(view.drawn["top"]), int(view.drawn["left"])
        expected = apply(sample.image, values)[top : top + 20, left : left + 20]
        assert np.array_equal(view.image, expected)
        compared += "adjust_contrast" in dict(values)
    assert compared > 10


def test_jitter_rounds_half_to_even_within_the_target() -> None:
    assert jitter_size((300, 420), (1024, 1024), 1.0) == (731, 1024)
    assert jitter_size((480, 640), (1024, 1024), 0.1) == (77, 102)
    assert jitter_size((5, 2), (1, 1), 0.1) == (1, 1)
    assert jitter_size((1, 2), (5, 5), 1.0) == (2, 5)  # 2.5


def test_a_flip_before_the_crop_is_a_crop_of_the_mirror_image() -> None:
    augment = Augment(crop=(60, 50), flip=1.0, flip_first=True)
    sample = tiles(90, 130, side=10)
    mirror = replace(
        sample, image=sample.image[:, ::-1], truth=replace(sample.truth, segments=sample.truth.segments[:, ::-1])
    )
    for epoch in range(4):
        flipped = training_view(sample, augment, generator(0, epoch, 0))
        cropped = training_view(mirror, replace(augment, flip=0.0), generator(0, epoch, 0))
        assert np.array_equal(flipped.image, cropped.image)
        assert np.array_equal(flipped.truth.segments, cropped.truth.segments)


def test_detr_crops_half_of_the_images_before_it_scales_them() -> None:
    augment, sample = POLICIES["detr"], tiles(240, 320)
    sizes = {short_side_size((240, 320), side, 1333, "detr") for side in augment.sides}
    early = 0
    for epoch in range(40):
        view = training_view(sample, augment, generator(1, epoch, 0))
        short, long = sorted(view.truth.size)
        assert long <= 1333 and (short in augment.sides or long >= 1332)
        if "early_height" in view.drawn:
            early += 1
            crop = int(view.drawn["early_height"]), int(view.drawn["early_width"])
            assert min(crop) >= 384 and max(crop) <= 600
            assert view.truth.size in {short_side_size(crop, side, 1333, "detr") for side in augment.sides}
        else:
            assert view.truth.size in sizes
    assert 12 <= early <= 28


def test_an_early_crop_shows_the_part_that_was_drawn() -> None:
    """Against scaling, cropping and scaling again in turn: the same part to within a pixel or two."""
    ramp = np.mgrid[:120, :160].astype(np.float32)
    image = np.stack([ramp[0], ramp[1], np.zeros_like(ramp[0])], -1).astype(np.uint8)
    sample = Sample(image, blank(120, 160), "ramp")
    augment = Augment(
        scale="short", sides=(90,), early_crop=(50, 70), early_sides=(100,), early_chance=1.0, flip=0.0, rule="detr"
    )
    for epoch in range(5):
        view = training_view(sample, augment, generator(0, epoch, 0))
        rng = generator(0, epoch, 0)
        rng.random()
        first = short_side_size((120, 160), int(rng.choice((100,))), UNLIMITED, "detr")
        crop = [int(rng.integers(50, min(side, 70) + 1)) for side in first]
        top, left = (int(rng.integers(0, side - cut + 1)) for side, cut in zip(first, crop, strict=True))
        part = cv2.resize(image, first[::-1])[top : top + crop[0], left : left + crop[1]]
        expected = cv2.resize(part, view.truth.size[::-1])
        difference = np.abs(view.image.astype(int) - expected)[2:-2, 2:-2]
        assert difference.max() <= 2 and view.truth.size == short_side_size((crop[0], crop[1]), 90, 4096, "detr")


def test_efficientps_scales_within_its_range_and_pads_nothing() -> None:
    assert ratio_size((1024, 2048), (1024, 2048), 1.0) == (1024, 2048)
    assert ratio_size((375, 500), (1024, 2048), 0.5001) == (512, 683)
    assert ratio_size((500, 375), (2048, 1024), 0.5001) == (683, 512)
    for epoch in range(6):
        view = training_view(tiles(100, 200), POLICIES["efficientps"], generator(0, epoch, 0))
        height, width = int(view.drawn["height"]), int(view.drawn["width"])
        assert 512 <= height <= 2048 and width == 2 * height
        assert view.truth.size == (min(height, 1024), min(width, 2048)) and view.truth.segments.all()


def test_cityscapes_sides_are_the_published_ones() -> None:
    assert POLICIES["cityscapes_m2f"].sides[:3] == (512, 614, 716) and POLICIES["cityscapes_m2f"].sides[-1] == 2048
    assert len(POLICIES["cityscapes_m2f"].sides) == 16


def test_sizes_that_vary_are_padded_when_they_are_stacked() -> None:
    views = [
        training_view(tiles(100, 140), replace(POLICIES["detr"], longest=600), generator(0, k, 0)) for k in range(3)
    ]
    images, targets = collate(views, 32)
    assert images.shape[2] % 32 == images.shape[3] % 32 == 0
    for b, view in enumerate(views):
        height, width = view.truth.size
        assert targets.frame.sizes[b].tolist() == [height, width]
        assert not images[b, :, height:].any() and not targets.segments[b, :, width:].any()
        assert np.array_equal(images[b, :, :height, :width].permute(1, 2, 0).numpy(), view.image)


def test_a_crop_that_one_class_fills_is_drawn_again() -> None:
    segments = np.ones((64, 256), np.int32)
    segments[:, 248:] = 2  # few crops see it
    sample = Sample(np.zeros((64, 256, 3), np.uint8), Segmentation(segments, np.arange(2)), "uneven")
    plain = Augment(crop=(64, 64), flip=0.0)
    shares = {}
    for share in (1.0, 0.95):
        views = [training_view(sample, replace(plain, crop_share=share), generator(0, k, 0)) for k in range(60)]
        shares[share] = np.mean([len(view.truth.labels) == 2 for view in views])
    assert shares[1.0] < 0.2 and 0.2 < shares[0.95] < 0.7  # of ten crops at 1/24 each: 35 %


def test_a_crop_that_loses_everything_says_so() -> None:
    segments = np.zeros((64, 256), np.int32)
    segments[:, :8] = 1
    sample = Sample(np.zeros((64, 256, 3), np.uint8), Segmentation(segments, np.zeros(1, np.int64)), "lost")
    views = [training_view(sample, Augment(crop=(64, 64)), generator(0, k, 0)) for k in range(30)]
    assert {bool(len(v.truth.labels)) for v in views} == {True, False}
    assert all((v.drawn.get("empty") == 1.0) == (len(v.truth.labels) == 0) for v in views)


def test_colours_leave_the_map_and_the_draws_of_geometry_alone() -> None:
    sample = replace(tiles(120, 160), image=np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    plain = Augment(scale="factor", crop=(70, 90))
    for epoch in range(8):
        views = [
            training_view(sample, replace(plain, colour=colour, colour_chance=1.0), generator(0, epoch, 0))
            for colour in ("none", "ssd", "colour004")
        ]
        assert all(np.array_equal(v.truth.segments, views[0].truth.segments) for v in views[1:])
        assert all(v.drawn["top"] == views[0].drawn["top"] for v in views)
        assert not np.array_equal(views[2].image, views[0].image)
        replayed = {name for name in views[2].drawn if name.startswith("colour/")}
        assert 1 <= len(replayed) <= 4
    untouched = training_view(sample, replace(POLICIES["colour004"], colour_chance=0.0), generator(0, 0, 0))
    assert np.array_equal(untouched.image, sample.image)


@pytest.mark.parametrize("name", ["detr", "lsj", "eomt", "cityscapes_m2f", "efficientps"])
def test_boxes_of_the_map_are_the_transformed_boxes(name: str) -> None:
    top, left, bottom, right = 93, 121, 210, 301
    segments = np.zeros((300, 420), np.int32)
    segments[top:bottom, left:right] = 1
    sample = Sample(np.zeros((300, 420, 3), np.uint8), Segmentation(segments, np.zeros(1, np.int64)), "box")
    compared = 0
    for epoch in range(6):
        view = training_view(sample, replace(POLICIES[name], colour="none", flip=0.0), generator(5, epoch, 0))
        if not len(view.truth.labels):
            continue
        rows, columns = (np.flatnonzero(view.truth.segments.any(axis)) for axis in (1, 0))
        for (first, last), span, side, scaled, start, limit in (
            ((top, bottom), rows, 300, "height", "top", view.truth.size[0]),
            ((left, right), columns, 420, "width", "left", view.truth.size[1]),
        ):
            low, high = (x * view.drawn[scaled] / side - view.drawn[start] for x in (first, last))
            assert abs(span[0] - max(low, 0)) <= 1 and abs(span[-1] + 1 - min(high, limit)) <= 1
            compared += 1
    assert compared >= 4


def test_a_second_copy_always_has_the_same_other_colours() -> None:
    sample = replace(tiles(60, 80), image=np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    augment = Augment(colour="colour004", doubled=True, flip=0.5)
    copies = [training_view(sample, augment, generator(0, k, 1), copy_generator(0, 0)) for k in range(6)]
    colours = [{n: v for n, v in copy.drawn.items() if n.startswith("colour/")} for copy in copies]
    assert colours[0] and all(c == colours[0] for c in colours)
    assert {copy.drawn["flip"] for copy in copies} == {0.0, 1.0}
    others = [training_view(sample, augment, generator(0, 0, 1), copy_generator(0, k)) for k in range(4)]
    assert len({tuple(other.drawn.items()) for other in others}) == 4


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"early_crop": (600, 384)}, "early_crop"),
        ({"early_crop": (384, 600), "crop": (64, 64)}, "early_crop"),
        ({"early_chance": 2.0}, "early_chance"),
        ({"colour_chance": -0.1}, "colour_chance"),
        ({"colour_operations": ()}, "colour_operations"),
        ({"doubled": True}, "doubled"),
        ({"crop_share": 0.0}, "crop_share"),
        ({"target": (0, 5)}, "target"),
    ],
)
def test_a_wrong_option_is_named(wrong: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_ranges(Augment(**wrong))


@pytest.mark.parametrize("size", [(1061, 1280), (1280, 1061), (640, 480), (333, 999), (1947, 400)])
def test_half_even_is_the_rule_of_large_scale_jitter(size: tuple[int, int]) -> None:
    """EoMT fits images into a square; detectron2's rule differs at exact halves."""
    assert short_side_size(size, 640, 640, "half_even") == jitter_size(size, (640, 640), 1.0)
    assert short_side_size((1280, 1061), 640, 640, "half_even") == (640, 530)
    assert short_side_size((1280, 1061), 640, 640, "detectron2") == (640, 531)
