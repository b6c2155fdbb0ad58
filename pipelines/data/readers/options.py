"""The options of the readers, as a command line gives them, and the choice of the reader by what a folder holds."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from pipelines.cluster import storage
from pipelines.data.config import AUTO, check_readers
from pipelines.data.readers.archive import Stream
from pipelines.data.readers.coconut import columns_of, parquet_files
from pipelines.data.readers.crowds import decode_merged
from pipelines.data.readers.source import Decode, Source
from pipelines.data.readers.tree import Tree, given

logger = logging.getLogger(__name__)


GENERAL = ("unlisted", "merge_crowds")
"""Options that concern what a reader decodes, whatever its format."""

_SNIFFED = 1 << 20
"""Bytes of a JSON that are looked through for the form of its annotations."""


def read_source(
    readers: Mapping[str, Callable[..., Source]],
    evidence: Mapping[str, Callable[[str], list[str]]],
    reader: str,
    root: storage.Uri,
    split: str,
    options: Mapping[str, Any],
) -> Source:
    """The source that a reader makes of a data set.

    Args:
        readers, evidence: the tables of `pipelines.data.readers`.
        reader: a key of `readers`, or "auto".
        root, split: of the data set.
        options: as `ReaderOptions.given` gives them.

    Raises:
        ValueError: there is no such reader, it has no such option, or it refuses the data set.
    """
    spelt = {
        key: value.replace("{split}", split) if isinstance(value, str) else value for key, value in options.items()
    }
    if reader == AUTO:
        reader = detect(evidence, root, split, spelt)
    if reader not in readers:
        check_readers(reader)
    own = {name: value for name, value in spelt.items() if name not in GENERAL}
    known = [name for name in inspect.signature(readers[reader]).parameters if name not in ("root", "split")]
    unknown = [_option(name) for name in own if name not in known]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: the reader {reader} has no such option; it has {', '.join(map(_option, known))}"
        )
    # a split that a format calls otherwise (training) keeps the name by which its shards are asked for (train)
    source = replace(readers[reader](root, split, **own), split=split)
    if not spelt:
        return source
    source = replace(source, decode=_decode_of(source, spelt))
    text = json.dumps([source.fingerprint, sorted(spelt.items())])
    about = {**source.about, "options": spelt}
    return replace(source, fingerprint=hashlib.sha256(text.encode()).hexdigest(), about=about)


def _decode_of(source: Source, options: Mapping[str, Any]) -> Decode:
    """The source's `decode` under the options that every reader takes.

    Raises:
        ValueError: the format has no ids that could be unlisted.
    """
    decode = source.decode
    if unlisted := options.get("unlisted"):
        if "unlisted" not in inspect.signature(decode).parameters:
            raise ValueError(
                f"--data.unlisted: the format {source.reader} has no list of ids, but classes of fixed values; leave "
                "it out"
            )
        decode = partial(decode, unlisted=unlisted)  # pyright: ignore[reportCallIssue]  # it has it, see above
    return partial(decode_merged, inner=decode) if options.get("merge_crowds") == "yes" else decode


def _option(name: str) -> str:
    return f"--data.{name.replace('_', '-')}"


def detect(
    evidence: Mapping[str, Callable[[str], list[str]]], root: storage.Uri, split: str, options: Mapping[str, Any]
) -> str:
    """The reader for a data set, by the files that it holds.

    Args:
        evidence: paths that tell each reader's format, for a split; the preferred reader first.
        root, split: of the data set.
        options: of the reader; the JSON that they name says it, too.

    Raises:
        ValueError: nothing that is looked for is there, or there is no such folder.
    """
    text = storage.absolute(root)
    if text.lower().endswith(".json") and not storage.is_folder(text):
        return _form(text)
    if text.lower().endswith(".xml") and not storage.is_folder(text):
        return "cvat"
    tree = Tree(text)
    if json_file := options.get("json_file"):
        at, path = given(tree, json_file, "--data.json-file")
        return _form(at.address(path))
    anchors = {anchor: reader for reader, paths in evidence.items() for anchor in paths(split)}
    hits = tree.find(list(anchors))
    if hits:
        anchor = next(anchor for anchor in anchors if f"/{hits[0]}".endswith(f"/{anchor}"))
        logger.info("reader %s: %s holds %s", anchors[anchor], tree.root, hits[0])
        return anchors[anchor]
    if files := parquet_files(tree, split):
        reader = "coconut" if "image_info" in columns_of(tree.address(files[0])) else "huggingface"
        logger.info("reader %s: %s holds %s", reader, tree.root, files[0])
        return reader
    listed = "".join(f"\n  {reader}: {', '.join(paths(split))}" for reader, paths in evidence.items())
    broken = "".join(f"\n{reason}" for reason in tree.unreadable)
    if split.startswith("test"):
        broken = f" Test splits have no public labels; jobs/predict.py takes their folder of photographs.{broken}"
    there = [other for other in SPLITS if tree.find([path for paths in evidence.values() for path in paths(other)])]
    told = f"; there are {', '.join(there)} (--data.train, --data.val and --data.split name them)" if there else ""
    raise ValueError(
        f"{tree.root}: no annotations of split {split} in a known format{told}; looked for{listed}\nin folders, zips, "
        f"and up to three folders further down. Check folder and split, or name the format with --data.reader.{broken}"
    )


def _form(address: str) -> str:
    """The reader for a JSON: the first annotation tells it."""
    stream, text = Stream(address), b""
    while piece := stream.read(_SNIFFED):
        text = text[-30:] + piece
        marks = {place: reader for mark, reader in _MARKS.items() if (place := text.find(mark)) >= 0}
        if marks:
            return marks[min(marks)]
    return "coco"


SPLITS = ("train", "val", "train2017", "val2017", "training", "validation")
"""Names of splits that are looked for where one is asked for that is not there."""

_MARKS = {
    b'"segments_info"': "coco",
    b'"segmentation"': "coco-instances",
    b'"segmentation_bitmap"': "segments-ai",
    b'"task_attributes"': "segments-ai",
    b'"original_width"': "label-studio",
}
"""Keys that only one form of JSON has."""
