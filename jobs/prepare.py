"""Check a data set and write it as shards: `python jobs/prepare.py --data.root ROOT --data.split train --out DIR`.

`--check` in place of `--out` checks all images and writes nothing; `--dry-run` reads the annotations
only. Killed and started again with the same options, it finishes what is missing. `python jobs/prepare.py --verify DIR`
checks shards that are there, and writes nothing: every file and every row of them against their manifest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.common import command
from panoptic.ranges import NonNegativeInt, PositiveInt
from panoptic.transforms import POLICIES, Augment
from pipelines.config import OneOrMore, parse_options
from pipelines.data.config import AUTO, READER_NAMES, OnInvalid, ReaderOptions, check_readers

if TYPE_CHECKING:
    from pipelines.data.manifest import Manifest
    from pipelines.data.readers.source import Source

SHOWN = 5
"""Problems that a dry run names; `--check` names all."""

SPELLINGS = {
    "--split": "--data.split",
    "--json": "--data.json-file",
    "--pngs": "--data.pngs",
    "--images": "--data.images",
    "--on-invalid": "--data.on-invalid",
}


USUAL = (
    *("data.root", "data.split", "out", "data.reader", "data.json_file", "data.images", "data.pngs", "data.class_map"),
    *("data.things", "check", "dry_run", "data.on_invalid", "report", "rows_per_shard", "shuffle", "seed"),
    *("augment.copies", "augment.originals", "policy"),
)
"""Options that most calls name, in the order of use: those of --help."""


@dataclass(frozen=True)
class DataSet(ReaderOptions):
    """The data set, and its parts where they are not found by themselves."""

    root: OneOrMore
    """Folder of the data set, local or s3://. Several, each alone or as NAME=FOLDER, are joined."""
    split: OneOrMore
    """Name of the split: train, val, train2017 …; or one for each root."""
    reader: OneOrMore = AUTO
    """Format of the data set, or of each: coco, cityscapes, mapillary … (the README lists them), or auto: its files
    tell it."""
    class_map: str = ""
    """Class map, what becomes of the classes: a JSON (infra/REFERENCE.md), or the name of one of
    `pipelines.data.class_maps`."""
    on_invalid: OnInvalid = "stop"
    """An image that fails validation: after all were checked nothing is written; or it is left out, and listed in
    rejected.jsonl beside the manifest."""


@dataclass(frozen=True)
class Options:
    """The data set that is prepared, and the form of its shards."""

    data: DataSet
    """The data set."""
    out: str = ""
    """Folder of its own for the shards, local or s3://; not needed with --check."""
    rows_per_shard: PositiveInt | None = None
    """Images in a shard; by default shards have about 64 MiB, and there are at least eight."""
    shuffle: bool | None = None
    """Shuffle the images; by default where the name of the split begins with train."""
    seed: NonNegativeInt = 0
    """Seed of the shuffle."""
    check: bool = False
    """Check everything and write nothing."""
    dry_run: bool = False
    """Read the annotations, say what there is and where shards would be written, and stop before the pixels."""
    report: str = ""
    """File for a page of statistics and pictures, one .html that needs nothing else."""
    policy: str = ""
    """The augmentation of copies to start from, which --augment.* changes: none, colour004, ssd, detr, lsj,
    eomt, cityscapes_m2f or efficientps (`panoptic.transforms.POLICIES`)."""
    augment: Augment = field(default_factory=Augment)
    """The augmentation of copies, as in training; --augment.copies N writes N of each image."""


@dataclass(frozen=True)
class VerifyOptions:
    """The shards that are checked, where `--verify` is given."""

    verify: str
    """Folder of shards, local or s3://."""


def main(arguments: Sequence[str] | None = None) -> Manifest | None:
    """Prepare one split, or verify one that is prepared, and print what it holds; of a dry run only that.

    Raises:
        ValueError: the data set or the options cannot be used, or the shards are not what was written.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if any(argument.startswith("--verify") for argument in arguments):
        return verified(parse_options(VerifyOptions, arguments, str(__doc__), {}).verify)
    if arguments and arguments[0] in READER_NAMES:  # the former form: READER ROOT
        print("READER ROOT is now --data.reader READER --data.root ROOT; the former form will go", file=sys.stderr)
        arguments = ["--data.reader", arguments[0], "--data.root", *arguments[1:]]
    options: Options = parse_options(with_policy(arguments), arguments, str(__doc__), SPELLINGS, USUAL)
    check_augment(options)
    check_readers(options.data.reader)
    if not options.out and not options.check and not options.dry_run:
        raise ValueError("--out DIR: missing; give a folder of its own for the shards, or --check to write nothing")

    # what follows takes seconds to import: help and mistakes on the command line need none of it
    from pipelines.cluster import storage
    from pipelines.data.copies import Copies
    from pipelines.data.duplicates import warn_of_neighbours
    from pipelines.data.join import Roots, with_copies
    from pipelines.data.manifest import problem_table
    from pipelines.data.prepare import check, prepare
    from pipelines.data.report import page, pictures

    for place, option in ((options.out, "--out"), (options.report, "--report")):
        if place:
            storage.check_lasting(place, option)
    data = options.data
    source = Roots.of(data.root, data.reader, data.class_map, data).open(data.split)
    if options.dry_run:
        print(outline(source, options))
        return None
    if options.check:
        manifest = check(source, data.on_invalid)
    else:
        manifest = prepare(
            with_copies(source, Copies(options.augment, options.seed)) if options.augment.copies else source,
            options.out,
            rows_per_shard=options.rows_per_shard,
            shuffle=options.shuffle,
            seed=options.seed,
            on_invalid=data.on_invalid,
        )
    if manifest.skipped:
        print(f"{len(manifest.skipped)} images were left out:\n{problem_table(manifest.skipped)}")
    print(manifest.summary())
    if not options.check:
        warn_of_neighbours(manifest)
    if options.report:
        storage.write_bytes(options.report, page(manifest, pictures(source)).encode())
        print(f"report: {options.report}")
    return manifest


def verified(folder: str) -> Manifest:
    """The shards of a folder, of which every file and every row was checked.

    Raises:
        ValueError: they are not what was written.
    """
    from pipelines.data.verify import verify

    manifest = verify(folder)
    print(f"{manifest.summary()}\nevery file and every row is what was written")
    return manifest


def outline(source: Source, options: Options) -> str:
    """A summary of the data that a preparation would read and write."""
    from pipelines.cluster import disk, storage

    classes, copies = source.categories, options.augment.copies
    written = (copies + options.augment.originals) * source.rows.num_rows if copies else source.rows.num_rows
    lines = [
        f"{source.rows.num_rows:,} images of split {source.split} of {source.root}, read as {source.reader}: "
        f"{disk.size(source.bytes)}",
        *(f"cannot be used: {problem.name}  {problem.reason}" for problem in source.problems[:SHOWN]),
        *([f"... {len(source.problems)} of them"] if len(source.problems) > SHOWN else []),
        f"{len(classes.things)} classes of things: {', '.join(classes.names[k] for k in classes.things)}",
        f"{len(classes.stuff)} classes of stuff: {', '.join(classes.names[k] for k in classes.stuff)}",
        f"would write {written:,} rows to {storage.absolute(options.out)}" if options.out else "would write nothing",
        "dry run: nothing was started and nothing written",
    ]
    return "\n".join(lines)


def with_policy(arguments: Sequence[str]) -> type[Options]:
    """The options, whose defaults of --augment.* are those of the policy that the arguments name.

    Raises:
        ValueError: there is no such policy.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    name = next((value for key, value in pairwise(words) if key == "--policy"), "")
    if not name:
        return Options
    if name not in POLICIES:
        raise ValueError(f"--policy {name}: unknown; there are {', '.join(POLICIES)}")

    @dataclass(frozen=True)
    class WithPolicy(Options):
        augment: Augment = field(default_factory=lambda: POLICIES[name])

    WithPolicy.__doc__ = Options.__doc__
    return WithPolicy


def check_augment(options: Options) -> None:
    """Refuse an augmentation without copies: an image itself is never changed.

    Raises:
        ValueError: names what is missing.
    """
    default = POLICIES.get(options.policy, Augment())
    if options.policy and not options.augment.copies:
        raise ValueError(f"--policy {options.policy} needs --augment.copies N: images themselves are never changed")
    if options.augment != default and not options.augment.copies:
        raise ValueError("--augment.* needs --augment.copies N: images themselves are never changed")
    if options.augment.doubled:
        raise ValueError("--augment.doubled is for training; here --augment.copies gives the number")


if __name__ == "__main__":
    command(main)
