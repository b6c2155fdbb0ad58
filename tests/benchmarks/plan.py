"""A plan on paper: what trainings of COCO and Mapillary take on 1, 8, 64 and 512 GPUs, and what gives way first.

    python -m tests.benchmarks.plan [--price 7.91] [--window 1] > plan.md

No such cluster was at hand. Each number comes from one of the tables below: MEASURED, of this repository, with where it
stands, and PUBLISHED or ASSUMED, with whose it is. The schedule of a paper is kept as its number of images; each GPU
takes the batch with which its step was measured, so the global batch grows with the GPUs. Beyond the paper's batch that
is another recipe, whose learning rate must grow too, and whose PQ nobody promises: such rows are marked.

Terms: N GPUs, r images a second of one GPU, b images of its batch, P parameters that are trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from panoptic.metrics.text import markdown_table
from panoptic.segmentation import Categories
from pipelines.presets import PRESETS

GPUS = (1, 8, 64, 512)

MEASURED_STEPS = {
    "panoptic-deeplab": (16, 640 * 640, 174),
    "panoptic-fpn": (16, 800 * 1088, 332),
    "panoptic-fcn": (16, 800 * 1088, 422),
    "jsis-net": (5, 400 * 400, 128),
    "detr": (16, 800 * 1088, 298),
    "maskformer": (16, 800 * 1088, 490),
    "mask2former": (16, 1024 * 1024, 1457),
}
"""Images, pixels of each and milliseconds of a training step in bfloat16 on one H200, ResNet-50 (for Panoptic-DeepLab
ResNet-52): infra/RESULTS.md, `make benchmark GPU=1`. EfficientPS was not measured on a GPU."""

MEASURED_MERGE_MS = {
    "panoptic-deeplab": 6.0,
    "panoptic-fpn": 9.9,
    "jsis-net": 9.9,
    "detr": 25.0,
    "maskformer": 35.0,
    "mask2former": 35.0,
    "panoptic-fcn": 14.0,
}
"""CPU milliseconds of merging one image of 800x1333 (Panoptic-DeepLab 640x640): infra/RESULTS.md; Panoptic
FCN's from the design's prototype, JSIS-Net's and MaskFormer's as those of their kind. On the GPU, which was not
measured, it should be less, so shares of validations are upper bounds."""

MEASURED_HEAD = (8.0, 0.27)
"""Percent of a core of Ray's head with `feed.decode map`, and what each rank adds: infra/README.md, "The feed, by the
number of ranks". With `collate`, the default, ranks make no call to the head, so it is no limit of the table."""

PUBLISHED_NVLINK = 450e9
"""Bytes a second of one direction of an H200's NVLink (NVIDIA, "H200 Tensor Core GPU": 900 GB/s both ways)."""
PUBLISHED_NETWORK = 50e9
"""Bytes a second of one GPU between machines: 3,200 Gbit/s for 8 (AWS, p5en.48xlarge)."""
PUBLISHED_STORE = 100e9 / 8
"""Bytes a second of one machine from the object store: 100 Gbit/s (AWS, p5en.48xlarge, outside of EFA)."""
PUBLISHED_GETS = 5500
"""Reads a second of one prefix of S3 (AWS, "Best practices design patterns"); a warm bucket splits prefixes itself."""
PUBLISHED_CORES = 12
"""Cores a GPU: 96 for 8 (AWS, p5en.48xlarge: 192 threads)."""
PUBLISHED_PRICE = 7.91
"""Dollars of a GPU for an hour: 63.30 for 8 on demand (AWS list price of p5en.48xlarge, 2025)."""
ASSUMED_FORWARD = 1 / 3
"""Share of a training step that a validation's forward takes: one of three passes."""

THINGS_AND_STUFF = {"coco": (80, 53), "mapillary": (37, 28)}
IMAGES = {"coco": (118_287, 5_000), "mapillary": (18_000, 2_000)}
"""Training and validation images: from the papers of the data sets."""

MEASURED_ROW = {"coco": (161e3, 3.8), "mapillary": (3161e3, 1000 / 6)}
"""Bytes of a row and CPU milliseconds from it to a training view: COCO's from `make benchmark` (161 kB, a view of
640x640), Mapillary's from the augmented copies in infra/REFERENCE.md (3264x2448, scale 0.5 to 2, crop 512x512)."""

MEASURED_COPIES = {"coco": (488e3, 1000 / 146), "mapillary": (536e3, 1000 / 56)}
"""The same of augmented copies stored as PNG."""

PRESET = {
    "coco": {
        "panoptic-deeplab": "panoptic-deeplab-r52-coco",
        **{name: f"{name}-r50-coco" for name in MEASURED_STEPS if name != "panoptic-deeplab"},
    },
    "mapillary": {name: f"{name}-r50-mapillary" for name in ("panoptic-fpn", "panoptic-fcn", "jsis-net")},
}
"""The presets whose schedules are planned."""

STAND_IN_SCHEDULE = "panoptic-fpn-r50-mapillary"
"""Its number of images and its crop stand for Mapillary where an architecture has no preset for it."""


@dataclass(frozen=True)
class Training:
    """One preset on one data set, on one GPU."""

    name: str
    data: str
    images: int
    """Of the whole schedule."""
    batch: int
    """Of the paper, global."""
    validations: int
    per_gpu: int
    """b."""
    rate: float
    """r."""
    gradients: float
    """Bytes of an all-reduce: 4 P."""
    merge: float
    """CPU seconds of merging one image."""


def training(architecture: str, data: str) -> Training:
    """The schedule of a preset, with the measured step scaled by the pixels of its crop."""
    from pipelines.training.preflight import meta_model

    own = architecture in PRESET[data]
    experiment = PRESETS[PRESET[data if own else "coco"][architecture]]()
    schedule = experiment if own else PRESETS[STAND_IN_SCHEDULE]()
    things, stuff = THINGS_AND_STUFF[data]
    names = [f"class {k}" for k in range(things + stuff)]
    categories = Categories.from_coco(
        [{"id": k, "name": name, "isthing": int(k < things), "color": [k, k, k]} for k, name in enumerate(names)], data
    )
    model = meta_model(experiment, categories)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch, pixels, milliseconds = MEASURED_STEPS[architecture]
    views = schedule.augment
    size = views.crop[0] * views.crop[1] or views.size[0] * views.size[1] or pixels
    per_gpu = max(1, round(batch * pixels / size))
    return Training(
        name=PRESET[data][architecture] if own else f"{architecture} (no preset)",
        data=data,
        images=schedule.train.steps * schedule.train.batch,
        batch=schedule.train.batch,
        validations=-(-schedule.train.steps // schedule.train.validate_every),
        per_gpu=per_gpu,
        rate=1000 * batch * pixels / milliseconds / size,
        gradients=4.0 * trained,
        merge=MEASURED_MERGE_MS[architecture] / 1000,
    )


@dataclass(frozen=True)
class Plan:
    """A training on N GPUs."""

    training: Training
    gpus: int
    rate: float
    """Images a second of all."""
    hours: float
    dollars: float
    shares: dict[str, float]
    """What the training takes of each limit; above 1 the limit rules, and `rate` is cut to it."""

    @property
    def next(self) -> str:
        """The limit that is nearest."""
        return max(self.shares, key=lambda name: self.shares[name])


def plan(one: Training, gpus: int, price: float = PUBLISHED_PRICE, window: int = 1, copies: bool = False) -> Plan:
    """Throughput, time, cost and limits of a training.

    Args:
        price: dollars of a GPU for an hour.
        window: rows that one request reads (`data.window`).
        copies: rows are augmented copies.
    """
    size, milliseconds = (MEASURED_COPIES if copies else MEASURED_ROW)[one.data]
    step = one.per_gpu / one.rate
    speed = PUBLISHED_NVLINK if gpus <= 8 else PUBLISHED_NETWORK
    reduce = 2 * (gpus - 1) / gpus * one.gradients / speed  # a ring; not overlapped with the backward pass
    rate = gpus * one.per_gpu / (step + reduce)
    machines = -(-gpus // 8)
    shares = {
        "all-reduce": reduce / (step + reduce),
        "CPU of the feed": rate / gpus * milliseconds / 1000 / PUBLISHED_CORES,
        "bytes from the store": rate * size / (machines * PUBLISHED_STORE),
        "requests to the store": rate / window / PUBLISHED_GETS,
    }
    hard = max(shares[name] for name in ("CPU of the feed", "bytes from the store", "requests to the store"))
    rate /= max(1.0, hard)
    validated = one.validations * IMAGES[one.data][1] * (ASSUMED_FORWARD / one.rate + one.merge) / gpus
    seconds = one.images / rate + validated
    shares["validation"] = validated / seconds
    return Plan(one, gpus, rate, seconds / 3600, seconds / 3600 * gpus * price, shares)


def table(price: float = PUBLISHED_PRICE, window: int = 1, copies: bool = False) -> str:
    """All trainings on all numbers of GPUs, in Markdown."""
    rows = [
        ["preset", "GPUs", "global batch", "images/s", "hours", "$", "all-reduce", "CPU of the feed", "store, bytes"]
        + ["store, requests", "validation", "next limit"]
    ]
    for data in PRESET:
        for architecture in MEASURED_STEPS:
            one = training(architecture, data)
            for gpus in GPUS:
                row = plan(one, gpus, price, window, copies)
                batch = gpus * one.per_gpu
                named = "all-reduce", "CPU of the feed", "bytes from the store", "requests to the store", "validation"
                cells = [
                    one.name if gpus == GPUS[0] else "",
                    str(gpus),
                    f"{batch}{'*' if batch > one.batch else ''}",
                    f"{row.rate:,.0f}",
                    f"{row.hours:,.1f}",
                    f"{row.dollars:,.0f}",
                    *(f"{100 * row.shares[name]:.0f} %" for name in named),
                    row.next,
                ]
                rows.append(cells)
    return markdown_table(rows)


def head(gpus: int) -> float:
    """Cores of Ray's head with `feed.decode map`."""
    return (MEASURED_HEAD[0] + MEASURED_HEAD[1] * gpus) / 100


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--price", type=float, default=PUBLISHED_PRICE, help="dollars of a GPU for an hour")
    parser.add_argument("--window", type=int, default=1, help="rows that one request reads (data.window)")
    parser.add_argument("--copies", action="store_true", help="rows are augmented copies stored as PNG")
    options = parser.parse_args(arguments)
    print(table(options.price, options.window, options.copies))
    cores = ", ".join(f"{head(gpus):.2f} with {gpus}" for gpus in GPUS)
    print(f"\nCores of Ray's head, where `feed.decode map` is chosen: {cores} ranks; none with `collate`.")


if __name__ == "__main__":
    main()
