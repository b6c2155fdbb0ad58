"""Names of files that are made of names of images."""

from __future__ import annotations

import pytest

from pipelines.cluster.file_names import LONGEST, PictureNames, safe_name


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("a b-1_2.x", "a b-1_2.x"),
        ("Straße 日本", "Straße 日本"),
        ("a#b?c%20d&e:f", "a_b_c_20d_e_f"),
        ("../x\n\\\x00", ".._x___".replace(".", "_", 1)),
        (".hidden", "_hidden"),
        ("", "_"),
        ("\udcff", "_"),
    ],
)
def test_characters_that_mean_something_elsewhere_are_replaced(name: str, safe: str) -> None:
    assert safe_name(name) == safe


def test_long_names_are_cut_and_stay_apart() -> None:
    names = [safe_name("日" * 200 + end) for end in "ab"]
    assert names[0] != names[1] and all(len(name.encode()) <= LONGEST for name in names)
    assert all(name.startswith("日" * 50) for name in names)


def test_no_two_pictures_have_one_name() -> None:
    given = ["a.jpg", "a.png", "c/a.jpg", "d/a.jpg", "A.jpg", "x#1.jpg", "x?1.jpg", "a", "a"]
    names = PictureNames()
    found = [names.add(name) for name in given]
    assert found[:4] == ["a", "a_png", "a_jpg", "d_a"] and found[5:7] == ["x_1", "x_1_jpg"]
    assert len({name.casefold() for name in found}) == len(given)
    again = PictureNames()
    assert [again.add(name) for name in given] == found
