"""Published weights as our checkpoint: `python jobs/convert.py FILE --source SOURCE --categories JSON --out MODEL.pt`.

FILE is a .pth or .pkl that the project SOURCE published; `panoptic.convert` lists the projects and their architectures.
What the weights cannot tell keeps the published default; `--set image_pool=[512,1024]` changes it.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from panoptic.convert import FAMILIES, convert, read_checkpoint
from panoptic.models import Architecture
from panoptic.segmentation import Categories
from panoptic.training.checkpoint import save
from panoptic.training.plain import from_plain, to_plain
from pipelines.cluster.storage import read_bytes, write_bytes


def main(arguments: list[str] | None = None) -> Architecture:
    """Convert, check that every weight found its place, write, and say what was recognised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="published checkpoint, local or s3://")
    parser.add_argument("--source", required=True, choices=[*FAMILIES], help="who wrote it")
    parser.add_argument("--categories", required=True, help="COCO-panoptic JSON, or its list of categories alone")
    parser.add_argument("--out", required=True, help="where the checkpoint goes, local or s3://")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="change a configuration field")
    given = parser.parse_args(arguments)
    entries = json.loads(read_bytes(given.categories))
    entries = entries["categories"] if isinstance(entries, dict) else entries
    categories = Categories.from_coco(entries, given.categories)
    state = read_checkpoint(io.BytesIO(read_bytes(given.file)), given.file)
    config, weights = convert(state, given.source, categories)
    config = _changed(config, given.set)
    model = config.build(categories)
    model.load_state_dict(weights)
    out = io.BytesIO()
    save(out, config=config, model=model)
    write_bytes(given.out, out.getvalue())
    for name, value in to_plain(config).items():
        print(f"{name:24} {value}")
    print(f"{len(weights)} weights of {given.file} -> {given.out}")
    return config


def _changed(config: Architecture, changes: list[str]) -> Architecture:
    """The configuration with fields replaced: `stuff_area=64`, `backbone.output_stride=16`."""
    plain = to_plain(config)
    for change in changes:
        path, _, value = change.partition("=")
        *above, field = path.split(".")
        at = plain
        for name in above:
            at = at.get(name) if isinstance(at, dict) else None
        if not isinstance(at, dict) or field not in at:
            raise ValueError(f"--set {change}: {type(config).__name__} has no field {path}")
        try:
            at[field] = json.loads(value)
        except json.JSONDecodeError:
            at[field] = value
    return from_plain(type(config), plain, "--set")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
