"""The features of a frozen backbone, computed once for all steps of a training and for all trainings that agree.

Where `data.cache_features` asks for it and the backbone is frozen as a whole, every view of an image that training will
see goes through the backbone once (`pipelines.data.feature_shards`), and training begins behind it. The views are
augmented copies of a fixed number; all have one size, so that no padding depends on the batch.

Losses are those of the same training without a cache but for rounding: the last bits of a convolution may depend on the
number of images that go through it together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from panoptic.models.base import PanopticModel
from panoptic.segmentation import Categories, Sample, Segmentation, collate
from panoptic.training.config import Engine
from panoptic.training.device import autocast, prepare, seed_torch, to_device
from panoptic.training.freezing import freeze_parameters
from panoptic.training.frozen_backbone import backbone_digest, learning_parameters
from panoptic.transforms import Augment
from pipelines.cluster import storage
from pipelines.cluster.actor_pool import Pool
from pipelines.config import Experiment
from pipelines.data.copies import copies_of, without
from pipelines.data.feature_maps import BACKBONE
from pipelines.data.feature_shards import Extract, ensure_features
from pipelines.data.manifest import Manifest
from pipelines.training.checkpoints import load_checkpoint
from pipelines.training.preflight import check_cache
from pipelines.training.worker import load_initial_weights


def cached_features(
    experiment: Experiment, images: Manifest, begin: str = "", pool: Pool | None = None
) -> Manifest | None:
    """The shards of features that a training reads in place of its images, computed where they are not there yet.

    Args:
        experiment: with the option `data.cache_features`.
        images: its training shards.
        begin: URI of a checkpoint whose training is continued, so that its backbone counts; "" = none.
        pool: the actors that compute; None = one a core, or one a GPU.

    Returns:
        None where the option is off, or the backbone learns, which a line says.

    Raises:
        ValueError: the features of an image would not be the same in every step; names the option and the remedy.
        DiskFull: they do not fit.
    """
    kind = experiment.data.cache_features
    if kind == "no":
        return None
    model = initial_model(experiment, images.categories, begin)
    if learning := learning_parameters(model):
        print(f"data.cache_features: {learning[0]} and others learn, so images are read and no features", flush=True)
        return None
    check_cache(experiment, model)
    check_views(experiment, images)
    size = (images.maximum_height, images.maximum_width)
    about = {BACKBONE: backbone_digest(model), "kind": kind, "precision": experiment.engine.precision, "size": size}
    cache = experiment.data.shards or storage.join(storage.absolute(experiment.storage), "shards")
    arguments = (model, kind, experiment.engine, size)
    nothing = Segmentation(np.zeros(size, np.int32), np.zeros(0, np.int64))
    maps = build_extract(*arguments, device="cpu")([Sample(np.zeros((*size, 3), np.uint8), nothing, "blank")])
    row_bytes = sum(array.nbytes for array in maps[0].values())
    return ensure_features(images, cache, about, build_extract, arguments, row_bytes, pool)


def initial_model(experiment: Experiment, categories: Categories, begin: str = "") -> PanopticModel:
    """The model with the weights with which the training starts, on this machine's CPU."""
    seed_torch(experiment.train.seed, 0, 0, 0)
    model: PanopticModel = experiment.model.build(categories)
    load_initial_weights(model, experiment, rank=1)
    if begin:
        weights = load_checkpoint(begin)["weights"]
        own = {name: value for name, value in weights.items() if name in model.state_dict()}
        model.load_state_dict(own, strict=False)
    freeze_parameters(model, experiment.train.freeze)
    return model.eval()


def check_views(experiment: Experiment, images: Manifest) -> None:
    """Refuse images that training would show in another way in every epoch.

    Raises:
        ValueError: names the option and the remedy.
    """
    copies = copies_of(images.source)
    rest = experiment.augment
    if copies is not None and not copies.augment.originals:
        rest = without(rest, copies.augment)
    if changes(rest):
        raise ValueError(
            "data.cache_features: augmentation makes another view of an image in every epoch; fix their number with "
            "--augment.copies N --augment.originals False (more copies, more variety and more disk)"
        )


def changes(augment: Augment) -> bool:
    """True for an augmentation that leaves not every image as it is."""
    geometry = (*augment.fit, *augment.size, *augment.early_crop, *augment.crop)
    return any(geometry) or augment.scale != "none" or augment.flip > 0 or augment.colour != "none" or augment.doubled


def build_extract(model: PanopticModel, kind: str, engine: Engine, size: tuple[int, int], device: str = "") -> Extract:
    """The function that computes the features of a few samples.

    Args:
        model: whose backbone is frozen.
        kind: of the stored numbers, float32 or float16.
        engine: precision in which the network will train.
        size: height and width of every sample.
        device: that computes; "" = a GPU where the process has one.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = prepare(model.eval().requires_grad_(False), device, engine)

    def extract(samples: Sequence[Sample]) -> list[dict[str, np.ndarray]]:
        for sample in samples:
            if sample.image.shape[:2] != size:
                shape = "x".join(map(str, sample.image.shape[:2]))
                raise ValueError(
                    f"{sample.name}: is {shape}, another image {size[0]}x{size[1]}; features are kept of views of one "
                    "size: give --augment.crop HEIGHT WIDTH (and --augment.pad end) beside --augment.copies"
                )
        images, targets = to_device(model, *collate(samples, model.divisor), engine)
        with torch.inference_mode(), autocast(images, engine):
            maps = model.frozen_features(model.normalised(images, targets.frame))
        arrays = {name: value.float().cpu().numpy().astype(kind) for name, value in maps.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            names = ", ".join(sample.name for sample in samples)
            raise ValueError(f"{names}: features that are not finite in {kind}; use --data.cache-features float32")
        return [{name: array[k] for name, array in arrays.items()} for k in range(len(samples))]

    return extract
