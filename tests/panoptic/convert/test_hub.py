"""Published weights by name: downloaded once, converted once, checked, and refused with a remedy."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import panoptic
from panoptic.classes import classes, table
from panoptic.convert import FAMILIES, hub
from panoptic.training.checkpoint import load
from panoptic.transforms import Resize
from tests.support.small import SMALL_DETR
from tests.support.weight_server import WeightServer, published_detr, serve_weights

VIEW = Resize(short=64, longest=96, rule="detr")


@pytest.fixture(scope="module")
def published() -> tuple[bytes, dict[str, torch.Tensor]]:
    return published_detr(replace(SMALL_DETR, heads=8, logits=250), classes("coco"))


@pytest.fixture
def server(published, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[WeightServer]:
    """Serves a file that the table has under the name "tiny"; the cache is empty."""
    monkeypatch.setenv(hub.CACHE, str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve_weights() as server:
        digits = hashlib.sha256(published[0]).hexdigest()[:8]
        server.files[f"tiny-{digits}.pth"] = published[0]
        entry = hub.Published(
            *("detr", "coco", "https://example.org/zoo", "CC BY-NC 4.0", 43.4, VIEW),
            url=f"{server.url}/detr/tiny-{digits}.pth",
            digest=f"sha256:{digits}",
            changes={"backbone.output_stride": 16, "threshold": 0.5},
        )
        monkeypatch.setitem(hub.PUBLISHED, "tiny", entry)
        yield server


def test_a_name_is_downloaded_and_converted_once(server, published, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        file = hub.find("hub:tiny")
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "hub:tiny: CC BY-NC 4.0 (https://example.org/zoo)"
    ]
    assert caplog.records[0].message.startswith("hub:tiny: CC BY-NC")  # before the download
    assert hub.find("tiny") == file and len(server.asked) == 1
    assert sorted(path.name for path in file.parent.iterdir()) == ["checkpoint-v1.pt", "lock"]
    record = load(str(file))
    assert record["config"]["backbone"]["output_stride"] == 16 and record["config"]["threshold"] == 0.5
    assert record["categories"] == classes("coco").to_coco()
    expected = published[1] | {"classes.index": torch.tensor(classes("coco").ids)}
    assert record["weights"].keys() == expected.keys()
    assert all(torch.equal(value, record["weights"][key]) for key, value in expected.items())
    model = panoptic.load("hub:tiny", device="cpu")
    assert model.resize == VIEW and model.categories.names[0] == "person"
    assert model(np.zeros((60, 80, 3), np.uint8)).size == (60, 80)


def test_two_that_want_it_at_once_make_one_download(server) -> None:
    server.late = 0.3
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(hub.find, ["tiny", "tiny"])
    assert first == second and len(server.asked) == 1


def test_a_file_that_was_put_there_by_hand_is_taken_and_kept(server, published, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(hub.PUBLISHED, "tiny", replace(hub.PUBLISHED["tiny"], url="", digest=""))
    with pytest.raises(ValueError, match=r"hub:tiny: its page gives no direct address; download it from .*/zoo by ha"):
        hub.find("tiny")
    place = tmp_path / "cache" / "tiny" / "model.pth"
    place.write_bytes(published[0])
    assert load(str(hub.find("tiny")))["step"] == 0 and place.exists() and server.asked == []


def test_another_file_put_there_by_hand_is_refused(server, tmp_path) -> None:
    place = tmp_path / "cache" / "tiny" / hub.PUBLISHED["tiny"].file
    place.parent.mkdir(parents=True)
    place.write_bytes(b"another")
    with pytest.raises(ValueError, match=r"tiny-\w+\.pth: not the published file: its SHA256 begins with \w{8} instea"):
        hub.find("tiny")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ({"status": 403}, "the server answers 403 Forbidden"),
        ({"status": 407}, "407 .*, so the proxy wants a name and a password in HTTPS_PROXY"),
        ({"files": {}}, "the server answers 404 Not Found"),
        ({"keep": 1000}, r"the download ended after 1000 of \d+ bytes|broke off \(IncompleteRead\(1000 bytes read"),
    ],
)
def test_a_download_that_fails_says_what_to_do(server, trouble, words, tmp_path: Path) -> None:
    for name, value in trouble.items():
        setattr(server, name, value)
    with pytest.raises(ValueError, match=words) as told:
        hub.find("tiny")
    address, place = hub.PUBLISHED["tiny"].url, tmp_path / "cache" / "tiny" / hub.PUBLISHED["tiny"].file
    assert f"try again later, or download {address} by hand to {place}, then the same again" in str(told.value)
    assert "\n" not in str(told.value)
    assert [path.name for path in place.parent.iterdir()] == ["lock"]


def test_a_broken_file_is_not_taken(server, published) -> None:
    (name,) = server.files
    server.files[name] = published[0][:-1] + b"x"
    with pytest.raises(ValueError, match=r"not the published file: its SHA256 begins with .*try again later, or downl"):
        hub.find("tiny")


def test_without_a_network(server, monkeypatch) -> None:
    address = hub.PUBLISHED["tiny"].url.replace("127.0.0.1", "weights.invalid")
    monkeypatch.setitem(hub.PUBLISHED, "tiny", replace(hub.PUBLISHED["tiny"], url=address))
    with pytest.raises(ValueError, match=r"no connection to weights\.invalid.*offline, or behind a proxy that HTTPS_"):
        hub.find("tiny")
    monkeypatch.setenv("http_proxy", server.url)
    assert load(str(hub.find("tiny")))["step"] == 0 and server.asked == [address]


def test_an_unknown_name_and_a_folder_that_cannot_be_written(server, monkeypatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hub:detr-r50: no such name; near: detr-r50-coco, .*--list shows all"):
        hub.find("hub:detr-r50")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(hub.CACHE, str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"hub:tiny: cannot write to .*; set PANOPTIC_CACHE to a folder with room"):
        hub.find("tiny")


def test_the_table_is_of_one_form() -> None:
    assert len(hub.PUBLISHED) > 40
    digits = {"md5": 6, "sha256": 8}
    for name, one in hub.PUBLISHED.items():
        assert re.fullmatch(r"[a-z0-9-]+", name) and one.source in FAMILIES and 20 < one.pq < 70, name
        assert table(one.classes)["categories"] and one.licence and one.page.startswith("https://"), name
        if one.url:
            assert re.fullmatch(r"https://\S+\.(pkl|pth|bin)", one.url), name
        if one.digest:
            kind, _, known = one.digest.partition(":")
            assert len(known) == digits[kind] and re.fullmatch("[0-9a-f]+", known) and known in one.file, name
    urls = [one.url for one in hub.PUBLISHED.values() if one.url]
    assert len(set(urls)) == len(urls)
