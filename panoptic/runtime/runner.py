"""A folder of exported graphs as a function from a photograph to its panoptic map.

Shapes: H x W pixels of a photograph, h x w after the resize.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from panoptic.png import decode_image
from panoptic.runtime import deeplab, detr, fcn, jsis, queries, two_stage
from panoptic.runtime.place import Place
from panoptic.segmentation import Categories, Sample, Segmentation
from panoptic.transforms import Resize, evaluation_view

METADATA = "panoptic"
"""The name under which a file of ours holds its description, JSON."""

FORMAT = 1
"""The format version of the description; a later one may be read by later versions only."""

NETWORK = "network"
"""The name of the first graph."""

MERGES: dict[str, Callable[..., Segmentation]] = {
    "queries": queries.merge,
    "centres": deeplab.merge,
    "detr": detr.merge,
    "kernels": fcn.merge,
    "fpn": two_stage.merge_fpn,
    "efficientps": two_stage.merge_efficientps,
    "jsis": jsis.merge,
}
"""The merge of each rule that a description names."""

ONE_GRAPH = ("queries", "centres")
"""Rules that need the network alone."""


class Runner:
    """An exported model that takes photographs.

    Args:
        source: the folder that `jobs/export.py --to onnx` wrote, or its `network.onnx`.
        threads: of ONNX Runtime; 0 = as many as cores.
        providers: of ONNX Runtime, such as "CUDAExecutionProvider"; by default its CPU's.

    Raises:
        ValueError: nothing of ours is there, or a later version wrote it; names the file.
        ModuleNotFoundError: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        path = Path(source)
        self._folder = path if path.is_dir() else path.parent
        self._open = partial(_session, threads=threads, providers=providers)
        file = self._folder / f"{NETWORK}.onnx" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file}: there is no such file; name a folder that jobs/export.py --to onnx wrote")
        self._sessions = {NETWORK: self._open(file)}
        self.description = _description(self._sessions[NETWORK], file)
        self.categories = Categories.from_coco(self.description["categories"], str(file))
        self.resize = Resize(**{key: _tuple(value) for key, value in self.description["resize"].items()})
        self._rules: Mapping[str, Any] = self.description["merge"]
        for name in self.description["graphs"][1:]:
            self._sessions[name] = self._open(self._folder / f"{name}.onnx")

    def __call__(self, photograph: np.ndarray | str | os.PathLike[str]) -> Segmentation:
        """The panoptic map of a photograph, uint8 [H, W, 3] RGB or an image file, at its own size."""
        if not isinstance(photograph, np.ndarray):
            photograph = decode_image(Path(photograph).read_bytes(), os.fspath(photograph))
        images, place = self.prepared(photograph)
        outputs = self.graph(NETWORK, {"images": images, "sizes": np.array([place.size], np.int64)})
        return self.merged(outputs, place)

    def prepared(self, photograph: np.ndarray) -> tuple[np.ndarray, Place]:
        """A photograph uint8 [H, W, 3], resized and padded for the network, uint8 [1, 3, h, w], and its sizes."""
        nothing = Segmentation(np.zeros(photograph.shape[:2], np.int32), np.zeros(0, np.int64))
        image = evaluation_view(Sample(photograph, nothing, ""), self.resize).image
        size, divisor = image.shape[:2], self.description["divisor"]
        height, width = (
            -(-max(least, side) // divisor) * divisor for least, side in zip(self.resize.canvas, size, strict=True)
        )
        images = np.zeros((1, 3, height, width), np.uint8)
        images[0, :, : size[0], : size[1]] = image.transpose(2, 0, 1)
        return images, Place((height, width), (size[0], size[1]), photograph.shape[:2])

    def graph(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The named outputs of a graph on those of the inputs that it has."""
        session = self._sessions[name]
        own = {entry.name: inputs[entry.name] for entry in session.get_inputs()}
        names = [entry.name for entry in session.get_outputs()]
        return dict(zip(names, session.run(names, own), strict=True))

    def merged(self, outputs: Mapping[str, np.ndarray], place: Place) -> Segmentation:
        """The panoptic map of the network's outputs for one image; segments without a pixel are left out."""
        rule = self._rules["rule"]
        second = () if rule in ONE_GRAPH else (self.graph,)
        return MERGES[rule](outputs, place, self.categories, self._rules, *second).compact()

    def __repr__(self) -> str:
        return f"<{self.description['architecture']} of {len(self.categories)} classes in {self._folder}>"


def run(source: str | os.PathLike[str], photograph: np.ndarray | str | os.PathLike[str]) -> Segmentation:
    """The panoptic map of one photograph by an exported model; `Runner` keeps it open for more."""
    return Runner(source)(photograph)


def _session(file: Path, threads: int, providers: Sequence[str]) -> Any:
    """An ONNX Runtime session of a file."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        message = f"{file}: ONNX Runtime is not installed; pip install onnxruntime (or panoptic-ray[export])"
        raise ModuleNotFoundError(message) from error
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; it belongs to {NETWORK}.onnx, export the model again")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    except Exception as error:  # its classes are not public
        raise ValueError(f"{file}: ONNX Runtime cannot open it: {str(error).splitlines()[0]}") from error


def _description(session: Any, file: Path) -> dict[str, Any]:
    """The description of the model in a network's file.

    Raises:
        ValueError: it says nothing, or a later version wrote it.
    """
    text = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if text is None:
        raise ValueError(f"{file}: holds no description of a model; name what jobs/export.py --to onnx wrote")
    description = json.loads(text)
    if description["format"] > FORMAT:
        raise ValueError(f"{file}: is of format {description['format']}; this version reads up to {FORMAT}: update it")
    return description


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
