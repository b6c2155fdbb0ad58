"""The model as MLflow keeps it: code, safetensors, two JSON files; nothing pickled.

This file is both halves. `log_model` stores itself as the model's code (models-from-code) beside a
copy of the `panoptic` package; `mlflow.pyfunc.load_model` executes the stored copy, which ends in
`set_model`. Hence at its top it may import mlflow and panoptic only: nothing else of `pipelines` is
there when it is loaded.

| artifact | content |
|---|---|
| weights.safetensors | state dict, the averaged one where there is one |
| config.json | {"format", "model": {"class", fields}, "resize": {fields}, "experiment": the run's flat options} |
| categories.json | list of COCO category entries |

config.json has "class_map", too, where a class map or a join changed the classes of the data.

The pyfunc takes encoded images (a list of bytes, or a frame with the column `image`; any format that OpenCV
reads), over HTTP in base64 in each of MLflow's four forms of a body, and gives for each a PNG of COCO-
panoptic ids (`id = R + 256 G + 65536 B`, column `png`) and the JSON list of its segments (column `segments`:
id, category_id, category, isthing, area, bbox, and score from models that score segments).
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import mlflow.artifacts
import mlflow.models
import mlflow.pyfunc
import pandas as pd
import torch
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import panoptic
from panoptic.models.base import PanopticModel
from panoptic.png import decode_image, to_coco
from panoptic.predictor import as_sample, name_segments, segment
from panoptic.segmentation import Sample
from panoptic.training.checkpoint import build_model, check_entries, check_finite
from panoptic.training.config import Engine
from panoptic.training.plain import from_plain, to_plain
from panoptic.transforms import Resize

if TYPE_CHECKING:
    from pipelines.tracking.runs import Run

FORMAT = 1

LOG_AGAIN = "log the model again, or take its checkpoint"

FILES = {"weights": "weights.safetensors", "config": "config.json", "categories": "categories.json"}

PACKAGES = (
    "mlflow",
    "numpy",
    "opencv-python-headless",
    "pandas",
    "pillow",
    "pycocotools",
    "safetensors",
    "scipy",
    "timm",
    "torch",
    "torchvision",
)
"""Requirements of the stored code, pinned to the versions in use. MLflow would need seconds and a subprocess."""


BASE64 = re.compile(rb"[A-Za-z0-9+/\s]+=*\s*")

UPLOAD = 120
"""Seconds that a store may take to answer once it has a file."""


@dataclass(frozen=True)
class Packaged:
    """A model that came out of the registry."""

    model: PanopticModel
    """On the CPU, in evaluation mode."""
    resize: Resize
    """Resizing of an image before the network; maps come back at the image's own size."""
    experiment: dict[str, Any]
    """Flat options of the run that trained it, precision among them."""
    class_map: dict[str, Any] | None = None
    """The record of the class map or join that changed the data sets' classes; None where nothing did."""


def write_package(folder: str | Path, checkpoint: Mapping[str, Any], resize: Resize) -> dict[str, str]:
    """Write the three files of a checkpoint (`panoptic.training.checkpoint.load`); returns their paths by name."""
    paths = {name: str(Path(folder) / file) for name, file in FILES.items()}
    weights = checkpoint["weights"] if checkpoint["ema"] is None else checkpoint["ema"]
    # clones: safetensors refuses tensors that share memory
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, paths["weights"])
    config = {
        "format": FORMAT,
        "model": checkpoint["config"],
        "resize": to_plain(resize),
        "experiment": checkpoint["experiment"],
        **({"class_map": checkpoint["class_map"]} if checkpoint.get("class_map") else {}),
    }
    Path(paths["config"]).write_text(json.dumps(config, indent=2))
    Path(paths["categories"]).write_text(json.dumps(checkpoint["categories"], indent=2))
    return paths


def read_package(paths: Mapping[str, str | Path]) -> Packaged:
    """The model of the three files.

    Raises:
        ValueError: a newer format, a file that is empty, cut short or of another kind, weights that are not finite, or
            files that do not fit each other.
    """
    config = _read_json(paths["config"])
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        stated = config.get("format") if isinstance(config, dict) else None
        raise ValueError(f"{paths['config']}: format {stated}, this version reads {FORMAT}")
    missing = [key for key in ("model", "resize", "experiment") if not isinstance(config.get(key), dict)]
    if missing:
        raise ValueError(f"{paths['config']}: has no {', '.join(missing)}; {LOG_AGAIN}")
    try:
        weights = load_file(str(paths["weights"]))
    except SafetensorError as error:
        raise ValueError(f"{paths['weights']}: cut short or no safetensors file ({error}); {LOG_AGAIN}") from error
    check_finite(weights, str(paths["weights"]))
    categories = _read_json(paths["categories"])
    check_entries(categories, str(paths["categories"]))
    record = {"config": config["model"], "categories": categories, "weights": weights, "ema": None}
    model = build_model(record, name=str(Path(paths["config"]).parent))
    class_map = config.get("class_map")
    if not isinstance(class_map, dict | None):
        raise ValueError(f"{paths['config']}: class_map is no class map; {LOG_AGAIN}")
    return Packaged(model, from_plain(Resize, config["resize"], "resize"), config["experiment"], class_map)


def _read_json(path: str | Path) -> Any:
    """The content of a JSON file of a package.

    Raises:
        ValueError: the file is empty, cut short or no JSON; names it.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: empty, cut short or no JSON ({error}); {LOG_AGAIN}") from error


Result = tuple[bytes, list[dict[str, Any]]]
"""PNG of segment ids at the size of the image, and its segments."""

BATCH = 8
"""Most images of one request that pass the network at once; only those of one size do."""


class NoImage(mlflow.MlflowException, ValueError):
    """No image of a request is one; MLflow's server answers 400 with the message, which is one line."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """The reason alone: the server would put the whole request in front of it."""
        return self.reason

    @message.setter
    def message(self, text: str) -> None:
        pass


def predict_image(packaged: Packaged, data: bytes, name: str = "image") -> Result:
    """The result of one image.

    Raises:
        ValueError: the bytes are no image.
    """
    (result,) = predict_images(packaged, [data], [name])
    if isinstance(result, ValueError):
        raise result
    return result


def predict_images(packaged: Packaged, images: Sequence[Any], names: Sequence[str]) -> list[Result | ValueError]:
    """The results of several images, for each that is none the reason.

    Args:
        images: bytes of image files, or their base64 as text or bytes.
        names: of the images, for the reasons.
    """
    samples: dict[int, Sample] = {}
    results: list[Any] = [None] * len(images)
    for place, (data, name) in enumerate(zip(images, names, strict=True)):
        try:
            samples[place] = as_sample(decode_image(_image_bytes(data, name), name), name)
        except ValueError as error:  # of this image; the others have their maps
            results[place] = error
    maps = segment(packaged.model, list(samples.values()), packaged.resize, Engine(), BATCH)
    categories = packaged.model.categories
    for place, found in zip(samples, maps, strict=True):
        png, record = to_coco(found, categories, names[place], f"{names[place]}.png")
        results[place] = (png, name_segments(record, categories))
    return results


def _image_bytes(data: Any, name: str) -> bytes:
    """The bytes of an image file. MLflow's server decodes base64 in data frames, and leaves it in `inputs`.

    Raises:
        ValueError: they are none, or broken base64.
    """
    if isinstance(data, str):
        data = data.encode(errors="replace")
    if not isinstance(data, bytes):
        raise ValueError(
            f"{name}: a {type(data).__name__}, where the bytes of an image file are wanted, or their base64"
        )
    if not BASE64.fullmatch(data):  # every image format has bytes that base64 has not
        return data
    try:
        return base64.b64decode(data)
    except ValueError as error:
        raise ValueError(f"{name}: broken base64 ({error})") from error


# MLflow warns at every class whose `predict` has no type hints, of which it would make a second, different
# signature; its own filter lets that pass any other, so the warning is recorded and dropped
with warnings.catch_warnings(record=True):

    class PanopticPredictor(PythonModel):
        """The pyfunc: encoded images in, PNG maps and segment lists out."""

        def load_context(self, context: PythonModelContext) -> None:
            """Read the three files, once, where MLflow has put them."""
            self.packaged = read_package(context.artifacts)
            self.packaged.model.to("cuda" if torch.cuda.is_available() else "cpu")

        def predict(self, context, model_input, params=None):
            """A frame whose column `image` (or only column) is bytes to a frame of `png` and `segments`.

            Bytes that are no image have an empty `png`, and in `segments` `{"error": …}`; where no image is one, the
            first of these errors is raised.
            """
            column = "image" if "image" in model_input else model_input.columns[0]
            images = model_input[column].tolist()
            results = predict_images(self.packaged, images, [f"image {k}" for k in range(len(images))])
            errors = [result for result in results if isinstance(result, ValueError)]
            if errors and len(errors) == len(results):
                raise NoImage(str(errors[0]))
            rows = [(b"", {"error": str(r)}) if isinstance(r, ValueError) else r for r in results]
            return pd.DataFrame({"png": [png for png, _ in rows], "segments": [json.dumps(found) for _, found in rows]})


def log_model(
    run: Run,
    checkpoint: Mapping[str, Any],
    resize: Resize,
    *,
    name: str = "model",
    register: str = "",
    alias: str = "",
    description: str = "",
    tags: Mapping[str, str] | None = None,
) -> str:
    """Store a checkpoint's model with a run and, when asked, in the registry.

    Args:
        register: name of the registered model that gets a new version; empty = none.
        alias: pointed at that version.
        description: Markdown that the pages of the model and of the version show.
        tags: of the version.

    Returns:
        "models:/m-…", which `load_packaged` and `mlflow.pyfunc.load_model` take.

    Raises:
        ConnectionError: the store does not answer; known after few seconds, before anything is written.
        Exception: MLflow's own, where it failed in between.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    from pipelines.tracking.client import answering

    signature = ModelSignature(
        # without a name, so that a plain list of bytes passes too
        inputs=Schema([ColSpec(DataType.binary)]),
        outputs=Schema([ColSpec(DataType.binary, "png"), ColSpec(DataType.string, "segments")]),
    )
    with answering(run.tracking_uri), _active(run), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # an input example would be an image in the registry; the signature is stated instead
        warnings.filterwarnings("ignore", ".*An input example was not provided")
        info = mlflow.pyfunc.log_model(
            name=name,
            python_model=__file__,
            artifacts=write_package(folder, checkpoint, resize),
            code_paths=[str(_code(folder))],
            pip_requirements=[f"{package}=={version(package).split('+')[0]}" for package in PACKAGES],
            signature=signature,
            tags={"mlflow.note.content": description} if description else None,
        )
    if register:
        register_model(run.tracking_uri, info.model_uri, register, alias=alias, description=description, tags=tags)
    return info.model_uri


def register_model(
    tracking_uri: str,
    model_uri: str,
    name: str,
    *,
    alias: str = "",
    description: str = "",
    tags: Mapping[str, str] | None = None,
) -> str:
    """Make a logged model a version of a registered one; the version that it is already, where it is one.

    Args:
        tracking_uri: of the store of both.
        model_uri: "models:/m-…".
        name: of the registered model.
        alias: pointed at the version; "" = none.
        description: Markdown that the version's page shows.
        tags: of the version.

    Returns:
        "models:/name/3".

    Raises:
        ConnectionError: the store does not answer.
        Exception: MLflow's own, where it refuses.
    """
    from pipelines.tracking.client import answering

    with answering(tracking_uri) as client, _store(tracking_uri):
        model = model_uri.rsplit("/", 1)[-1]
        same = [one for one in client.search_model_versions(f"name='{name}'") if model in str(one.source).split("/")]
        version = same[0] if same else mlflow.register_model(model_uri, name)
        for key, value in (tags or {}).items():
            client.set_model_version_tag(name, version.version, key, value)
        if description:
            client.update_model_version(name, version.version, description)
        if alias:
            client.set_registered_model_alias(name, alias, version.version)
    return f"models:/{name}/{version.version}"


def _code(folder: str) -> Path:
    """A copy of the `panoptic` package as it is written, without byte code."""
    source = Path(panoptic.__file__).parent
    return shutil.copytree(source, Path(folder) / source.name, ignore=shutil.ignore_patterns("__pycache__"))


def load_packaged(uri: str, tracking_uri: str = "") -> Packaged:
    """Everything of `models:/name@alias`, `models:/name/3`, `models:/m-…` or `runs:/<id>/model`.

    Args:
        tracking_uri: of the store; MLflow's current one by default.

    Raises:
        ValueError: nothing of ours lies there.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    from pipelines.cluster.masking import masked
    from pipelines.tracking.client import patience

    with patience(3, 300), _store(tracking_uri or mlflow.get_tracking_uri()), tempfile.TemporaryDirectory() as folder:
        try:
            if uri.startswith("models:/"):
                # not the code beside them: hundreds of files, each of which is a request of every actor that loads it
                get_artifact_repository(uri).download_artifacts("artifacts", folder)
                root = folder
            else:
                root = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder)
        except (mlflow.MlflowException, OSError) as error:
            raise ValueError(masked(f"{uri}: not found in {mlflow.get_tracking_uri()} ({error})")) from error
        paths = {name: Path(root) / "artifacts" / file for name, file in FILES.items()}
        missing = [path.name for path in paths.values() if not path.exists()]
        if missing:
            raise ValueError(f"{uri}: lacks {', '.join(missing)}; it was not logged by panoptic-ray")
        return read_package(paths)


@contextmanager
def _active(run: Run) -> Iterator[None]:
    """The run as MLflow's active one, with time for large files; MLflow's globals are put back afterwards."""
    from pipelines.tracking.client import LAST_WORDS, patience

    with _store(run.tracking_uri), patience(1, UPLOAD):
        mlflow.start_run(run_id=run.run_id, nested=True)
        try:
            yield
        except BaseException:
            with patience(0, LAST_WORDS):  # the store may have gone
                mlflow.end_run("FAILED")
            raise
        mlflow.end_run()


@contextmanager
def _store(tracking_uri: str) -> Iterator[None]:
    """MLflow's tracking store; `models:/` is looked up in no other, whatever `download_artifacts` is told."""
    environment, uri = dict(os.environ), mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(uri)
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            if name not in environment:
                del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if name.startswith("MLFLOW_")})


mlflow.models.set_model(PanopticPredictor())
