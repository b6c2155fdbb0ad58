"""Published weights as our checkpoint: `python jobs/convert.py FILE --source SOURCE --categories JSON --out MODEL.pt`.

FILE is a .pth or .pkl that the project SOURCE published; `panoptic.convert` lists the projects and their architectures.
What the weights cannot tell keeps the published default; `--set image_pool=[512,1024]` changes it.
EoMT's files on DINOv3 hold differences from the published ViT, which `--base FILE` adds.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import command
from panoptic.ranges import NonNegativeInt, SideOrZero, check_ranges
from pipelines.config import File, Repeated, parse_options

if TYPE_CHECKING:
    from panoptic.convert import Hints
    from panoptic.models import Architecture

logger = logging.getLogger(__name__)

MIB = 1 << 20
"""Bytes that are read at once, and of which the progress is told."""

SOURCES = (
    *("panoptic-deeplab", "detectron2", "panopticfcn", "detr", "maskformer", "mask2former", "efficientps", "eomt"),
    "transformers",
)
"""Projects whose checkpoints are read: the keys of `panoptic.convert.FAMILIES`."""


@dataclass(frozen=True)
class Options:
    """A published checkpoint, and the place of ours."""

    file: File
    """Published checkpoint, local or s3://."""
    source: str
    """The project that wrote it: panoptic-deeplab, detectron2, panopticfcn, detr, maskformer, mask2former, efficientps,
    eomt or transformers."""
    categories: str
    """COCO-panoptic JSON in the order of the published head, or its list of categories alone."""
    out: str
    """The file that the checkpoint is written to, local or s3://."""
    set: Repeated[tuple[str, ...]] = ()
    """FIELD=JSON: change a field of the configuration; may be repeated."""
    base: str = ""
    """EoMT: the file of the ViT that FILE holds differences from (DINOv3, Hugging Face's or Meta's names), local or
    s3://; none = FILE holds the ViT itself, whatever its norms look like."""
    heads: NonNegativeInt = 0
    """EoMT: heads of each block, which no file tells; 0 = one for 64 channels, as published."""
    query_blocks: NonNegativeInt = 0
    """EoMT: blocks that hold queries; 0 = what the file says, or the published number for its depth."""
    canvas: tuple[SideOrZero, SideOrZero] = (0, 0)
    """EoMT: height and width of the images that it was trained for; 0 0 = the square of the file's positions, or 640
    pixels where it has none (DINOv3)."""


def main(arguments: Sequence[str] | None = None) -> Architecture:
    """Convert, check that every weight found its place, write, and say what was recognised."""
    given = sys.argv[1:] if arguments is None else arguments
    options: Options = parse_options(Options, given, str(__doc__), {})
    if options.source not in SOURCES:
        raise ValueError(f"--source {options.source}: unknown; there are {', '.join(SOURCES)}")

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from panoptic.convert import convert, read_checkpoint
    from panoptic.segmentation import Categories
    from panoptic.training.checkpoint import save
    from panoptic.training.plain import to_plain
    from pipelines.cluster.json_file import read_json
    from pipelines.cluster.storage import write_bytes

    remedy = "give a COCO-panoptic JSON, or its list of categories"
    entries = read_json(options.categories, dict[str, Any] | list[Any], remedy)
    if isinstance(entries, dict):
        if "categories" not in entries:
            raise ValueError(f"{options.categories}: has no categories; {remedy}")
        entries = entries["categories"]
    categories = Categories.from_coco(entries, options.categories)
    state = read_checkpoint(io.BytesIO(content_of(options.file)), options.file)
    logger.info("converting %d tensors", len(state))
    config, weights = convert(state, options.source, categories, hints_of(options))
    config = changed(config, options.set)
    logger.info("building %s and writing %s", type(config).__name__.removesuffix("Config"), options.out)
    model = config.build(categories)
    model.load_state_dict(weights)
    out = io.BytesIO()
    save(out, config=config, model=model)
    write_bytes(options.out, out.getvalue())
    for name, value in to_plain(config).items():
        print(f"{name:24} {value}")
    print(f"{len(weights)} weights of {options.file} -> {options.out}")
    return config


def content_of(file: str) -> bytes:
    """The bytes of a file, which may take minutes to come from S3: with rate and time left."""
    from pipelines.cluster.progress import progress
    from pipelines.cluster.storage import open_file

    logger.info("reading %s", file)
    content = bytearray()
    with open_file(file) as stream, progress("read", -(-stream.size() // MIB), "MiB") as state:
        while piece := stream.read(MIB):
            content += piece
            state.advance(1)
    return bytes(content)


def hints_of(options: Options) -> Hints:
    """The hints that the options add to the file."""
    from panoptic.convert import Hints, read_checkpoint

    whole = options.base.lower() == "none"
    base = None
    if options.base and not whole:
        base = read_checkpoint(io.BytesIO(content_of(options.base)), options.base)
    return Hints(base, whole, options.heads, options.query_blocks, options.canvas)


def changed(config: Architecture, changes: Sequence[str]) -> Architecture:
    """The configuration with fields replaced: `stuff_area=64`, `backbone.output_stride=16`."""
    from panoptic.training.plain import from_plain, to_plain

    plain = to_plain(config)
    for change in changes:
        path, _, value = change.partition("=")
        *above, name = path.split(".")
        node = plain
        for part in above:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or name not in node:
            raise ValueError(f"--set {change}: {type(config).__name__} has no field {path}")
        try:
            node[name] = json.loads(value)
        except json.JSONDecodeError:
            node[name] = value
    result = from_plain(type(config), plain, "--set")
    check_ranges(result)
    return result


if __name__ == "__main__":
    command(main)
