"""A training that is only told: its options, its model, its data, and what it would write. Nothing is started."""

from __future__ import annotations

from panoptic.segmentation import Categories
from panoptic.training.freezing import freeze_parameters
from panoptic.training.summary import summarise_model, summary_text
from pipelines.cluster import disk, storage
from pipelines.cluster.masking import masked
from pipelines.config import Experiment, flatten
from pipelines.data.join import Roots
from pipelines.data.manifest import Manifest, former_manifest, is_shards
from pipelines.option_help import ORDER
from pipelines.tracking import runs
from pipelines.training.checkpoints import checkpoint_bytes, most_at_once, optimiser_slots
from pipelines.training.driver import checked, local_root, named, scenes_folder
from pipelines.training.machine import image_size
from pipelines.training.preflight import check_machine, meta_model
from pipelines.training.record import read_record
from pipelines.training.sharing import accumulation, workers_for
from pipelines.training.state import last_step


def dry_run(experiment: Experiment, preset: str) -> str:
    """The text that says what a training would do, after the checks that need no Ray.

    Args:
        experiment: parsed options.
        preset: its name.

    Raises:
        ValueError, DiskFull, ConnectionError: what the training itself would be refused for.
    """
    experiment, categories = checked(named(experiment, preset))
    data = describe_data(experiment)  # before anything is printed, so that an error stands alone
    parts = {
        "options": describe_options(experiment),
        "model": describe_model(experiment, categories),
        "data": data,
        "length": describe_length(experiment),
        "would be written": describe_places(experiment, categories),
    }
    text = "\n\n".join(f"{title}\n{'-' * len(title)}\n{part}" for title, part in parts.items())
    return f"{text}\n\ndry run of {preset}: nothing was started and nothing written"


def describe_options(experiment: Experiment) -> str:
    """Every option with its value, a line each, in the order of `--help-all`."""
    flat = flatten(experiment)
    groups = {group: [path for path in flat if path.rpartition(".")[0].split(".")[0] == group] for group in ORDER}
    return "\n".join(f"{path} {masked(_words(flat[path]))}".rstrip() for paths in groups.values() for path in paths)


def describe_model(experiment: Experiment, categories: Categories) -> str:
    """The table of parameters and memory with which a training begins, of a model that takes no memory."""
    model, optim = meta_model(experiment, categories), experiment.optim
    freeze_parameters(model, experiment.train.freeze)
    size = image_size(experiment.augment)
    return summary_text(summarise_model(model, size, optimiser_slots(optim), optim.ema > 0))  # pyright: ignore


def describe_data(experiment: Experiment) -> str:
    """Both splits: where they are, how many images they have, and their classes.

    Raises:
        ValueError: there is no such data.
    """
    data = experiment.data
    if data.root == "scenes":
        scenes = data.scenes
        return (
            f"{scenes.train} training and {scenes.val} validation scenes, to be drawn into {scenes_folder(experiment)}"
        )
    roots = Roots.of(data.root, data.reader, data.class_map, data)
    lines = [f"root  {masked(' '.join(roots.places))}"]
    categories = None
    for label, split in (("train", data.train), ("val", data.val)):
        rows, wrong, categories = _split(roots, split)
        name = split if isinstance(split, str) else " ".join(split)
        unusable = f", and {wrong} that cannot be used" if wrong else ""
        lines.append(f"{label:5} {rows:,} images of split {name}{unusable}")
    assert categories is not None
    for kind, indices in (("things", categories.things), ("stuff", categories.stuff)):
        lines.append(f"{len(indices)} classes of {kind}: {', '.join(categories.names[index] for index in indices)}")
    return "\n".join(lines)


def _split(roots: Roots, split: str | tuple[str, ...]) -> tuple[int, int, Categories]:
    """Number of images of a split, of those that cannot be used, and its classes; of shards from their manifest."""
    if len(roots.roots) == 1 and isinstance(split, str) and not roots.class_map:
        for folder in (storage.join(roots.places[0], split), roots.places[0]):
            if is_shards(folder) and not former_manifest(folder):
                manifest = Manifest.load(folder)
                return manifest.rows, len(manifest.skipped), manifest.categories
    source = roots.open(split)
    return source.rows.num_rows, len(source.problems), source.categories


def describe_length(experiment: Experiment) -> str:
    """Steps, batch, what a worker does of it, and how often it is validated."""
    train = experiment.train
    workers = workers_for(train, train.workers)
    parts = accumulation(train, workers)
    share = train.batch // workers // parts
    try:
        check_machine(experiment)
        note = ""
    except ValueError as error:
        note = f"\nNOT ON THIS MACHINE: {error}"
    return (
        f"{last_step(train):,} of {train.steps:,} steps of {train.batch} images: {train.workers} workers, each "
        f"{parts} x {share} images a step where {workers} train; validation every {train.validate_every} steps{note}"
    )


def describe_places(experiment: Experiment, categories: Categories) -> str:
    """Shards, checkpoints with their size, and the MLflow run; and what is there already under this name."""
    base, train = storage.absolute(experiment.storage), experiment.train
    folder = storage.join(base, experiment.name)
    model = meta_model(experiment, categories)
    freeze_parameters(model, train.freeze)
    one, count = checkpoint_bytes(model, experiment.optim), most_at_once(train)
    record = read_record(folder)
    lines = [
        f"shards       {_shards(experiment)}",
        f"checkpoints  {folder}: at most {count} of {disk.size(one)} each at a time",
        f"MLflow       {masked(runs.resolve_uri(experiment.tracking, local_root(experiment)))}, "
        f"experiment {experiment.tracking.experiment}",
    ]
    if experiment.tracking.register:
        lines.append(f"model        registered as {experiment.tracking.register}")
    lines.append(f"the run {'goes on: ' + record['run_id'] if record else 'is new'}")
    return "\n".join(lines)


def _shards(experiment: Experiment) -> str:
    data = experiment.data
    if data.root != "scenes":
        roots = Roots.of(data.root, data.reader, data.class_map, data)
        alone = len(roots.roots) == 1 and isinstance(data.val, str) and not roots.class_map
        if alone and any(map(is_shards, (storage.join(roots.places[0], str(data.val)), roots.places[0]))):
            return "none: the data is prepared already"
    return data.shards or storage.join(storage.absolute(experiment.storage), "shards")


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
