"""Published weights by name: `panoptic.load("hub:detr-r50-coco")`, `--train.weights hub:detr-r50-coco`.

`PUBLISHED` is the table: for each name the file that its authors published, its licence, its classes, the size at which
it was evaluated and its PQ there. A name is that of the preset with the same network where there is one, so that
`jobs/train.py NAME --train.weights hub:NAME` fine-tunes it. `find` downloads a file once, converts it once, and gives
the path of our checkpoint.

The addresses and figures stand in the projects' own tables (`Published.page`), read in November 2026. None of the files
could be downloaded where this was written: each conversion is tested on the names and shapes that the project's file
has, not on the file. No project publishes whole digests: detectron2, MaskFormer and Mask2Former write the first six
digits of the MD5 into the name of a file, DETR the first eight of the SHA-256, and these are checked. Of the others
only the length is, which the server says.

Files behind a page with buttons (Google Drive, Dropbox) have no `url`: they are downloaded by hand. Not in the table:
EoMT on DINOv3, whose files need a second one with its own licence (`jobs/convert.py --base`); PanopticFCN-400 and -512,
whose two links are one; EfficientPS of KITTI, whose order of classes is not published; models of ResNeXt, Xception,
HRNet and MobileNet, and of cascades, which no architecture here is made for.

| environment variable | what it does |
|---|---|
| PANOPTIC_CACHE | folder of the files, instead of ~/.cache/panoptic-ray |
| HTTPS_PROXY, NO_PROXY | as in every program |
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from panoptic.classes import classes
from panoptic.convert import convert, read_checkpoint
from panoptic.convert.download import download
from panoptic.published import PREFIX, PUBLISHED, Published
from panoptic.training.checkpoint import save
from panoptic.training.plain import from_plain, to_plain

logger = logging.getLogger(__name__)


CACHE = "PANOPTIC_CACHE"
"""Environment variable: the folder of downloaded and converted files."""

VERSION = 1
"""Version of converted files: another one where a change of `panoptic.convert` makes others of the same downloads."""


def find(name: str) -> Path:
    """The checkpoint of a published model, in the cache; downloaded and converted where it is not there yet.

    Several processes that want the same one wait for the first. What is interrupted leaves no file that looks whole.

    Args:
        name: of `PUBLISHED`, with or without "hub:".

    Returns:
        a file that `panoptic.training.checkpoint.load` reads.

    Raises:
        ValueError: there is no such name, the file cannot be downloaded or is not the published one, or it cannot be
            converted; in one line that says what to do.
    """
    name = name.removeprefix(PREFIX)
    if name not in PUBLISHED:
        near = get_close_matches(name, PUBLISHED, 4, 0.5) or list(PUBLISHED)[:4]
        raise ValueError(f"{PREFIX}{name}: no such name; near: {', '.join(near)} (jobs/train.py --list shows all)")
    folder = cache_folder() / name
    converted = folder / f"checkpoint-v{VERSION}.pt"
    if converted.is_file():
        return converted
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder / "lock"):
            if not converted.is_file():
                _make(name, PUBLISHED[name], folder, converted)
    except OSError as error:
        raise ValueError(
            f"{PREFIX}{name}: cannot write to {folder} ({error}); set {CACHE} to a folder with room"
        ) from error
    return converted


def cache_folder() -> Path:
    """The folder of downloaded and converted files."""
    return Path(os.environ.get(CACHE) or Path.home() / ".cache" / "panoptic-ray").expanduser()


def _make(name: str, published: Published, folder: Path, converted: Path) -> None:
    """Download, unless the file was put there by hand, and convert."""
    source = folder / published.file
    by_hand = source.is_file()
    if by_hand:
        _check_digest(name, source, published.digest)
    else:
        # a library has its warnings seen without any set-up of logging, and a licence is to be seen
        logger.warning("%s%s: %s (%s)", PREFIX, name, published.licence, published.page)
        remedy = f"download {published.url or 'it from ' + published.page} by hand to {source}, then the same again"
        if not published.url:
            raise ValueError(f"{PREFIX}{name}: its page gives no direct address; {remedy}")
        logger.info("downloading %s", published.url)
        part = folder / "download.part"
        try:
            download(published.url, part)
            _check_digest(name, part, published.digest)
            os.replace(part, source)
        except ValueError as error:
            raise ValueError(f"{PREFIX}{name}: {error}; try again later, or {remedy}") from error
        finally:
            part.unlink(missing_ok=True)
    logger.info("converting %s", source)
    with source.open("rb") as file:
        state = read_checkpoint(file, str(source))
    config, weights = convert(state, published.source, classes(published.classes))
    config = _changed(config, published.changes)
    model = config.build(classes(published.classes))
    model.load_state_dict(weights)
    part = folder / "checkpoint.part"
    try:
        options = {f"resize.{key}": value for key, value in to_plain(published.resize).items()}
        save(str(part), config=config, model=model, experiment=options)
        os.replace(part, converted)
    finally:
        part.unlink(missing_ok=True)
    if not by_hand:
        source.unlink()  # the checkpoint has all of it


def _check_digest(name: str, file: Path, digest: str) -> None:
    """Compare a file with what is published of its digest.

    Raises:
        ValueError: it is another file.
    """
    kind, _, expected = digest.partition(":")
    if not expected:
        return
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, kind).hexdigest()
    if not found.startswith(expected):
        raise ValueError(
            f"{file}: not the published file: its {kind.upper()} begins with {found[: len(expected)]} instead of "
            f"{expected}; remove it, and download {PUBLISHED[name].url} again"
        )


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The configuration with some fields replaced."""
    plain = to_plain(config)
    for path, value in changes.items():
        *above, last = path.split(".")
        node = plain
        for part in above:
            node = node[part]
        node[last] = value
    return from_plain(type(config), plain, "hub")


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Hold a lock that other processes wait for; it ends with the process, however that ends."""
    with file.open("w") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process is getting %s; waiting for it", file.parent)
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
