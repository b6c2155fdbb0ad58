"""Graphs as files of a folder, with the description of the model in the first one.

| format | files | the description |
|---|---|---|
| onnx | network.onnx and second graphs | metadata "panoptic" of network.onnx |
| torch | network.pt2 … of `torch.export.save` | extra file "panoptic.json" of network.pt2 |
| aot | network.pt2 … of AOTInductor, for this machine's kind of device | metadata "panoptic" of network.pt2 |

Everything is computed in float32, whatever the precision of the training.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.export import ExportedProgram

from panoptic.export.graphs import Graph, constant_padding, network_graph, second_graphs
from panoptic.export.rules import describe
from panoptic.models.base import PanopticModel
from panoptic.runtime.runner import METADATA
from panoptic.transforms import Resize

logger = logging.getLogger(__name__)

Format = Literal["onnx", "torch", "aot"]

FORMATS: tuple[Format, ...] = get_args(Format)

ENDINGS = {"onnx": ".onnx", "torch": ".pt2", "aot": ".pt2"}


def write(
    model: PanopticModel, resize: Resize, folder: str | os.PathLike[str], to: Format = "onnx", batch: bool = True
) -> dict[str, Path]:
    """Export a model into a folder.

    Args:
        model: on the CPU; it is put into evaluation mode.
        resize: of a photograph before the network, as the model was evaluated.
        folder: made where it does not exist.
        to: the format.
        batch: the network takes any number of images; else one.

    Returns:
        the file of each graph, the network first.

    Raises:
        ValueError: a part of the model cannot be exported, an extra is not installed, or there is no compiler; names
            it.
    """
    check_tools(to)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    model = model.eval().float()
    with quiet(), torch.no_grad(), constant_padding(model):
        first = network_graph(model, batch)
        outputs = first.module(*first.arguments)
        graphs = [first, *second_graphs(model, {name: value[:1] for name, value in outputs.items()})]
        description = json.dumps(describe(model, resize, [graph.name for graph in graphs], batch))
        files = {}
        for graph in graphs:
            logger.info("exporting %s", graph.name)
            files[graph.name] = file = out / f"{graph.name}{ENDINGS[to]}"
            program = trace(graph)
            own = description if graph is first else None
            if to == "onnx":
                _write_onnx(program, graph, file, own)
            elif to == "torch":
                torch.export.save(program, file, extra_files=None if own is None else {f"{METADATA}.json": own})
            else:
                _compile(program, file, own)
    return files


def check_tools(to: Format) -> None:
    """Refuse a format whose tools are missing, before any work.

    Raises:
        ValueError: onnx, onnxscript or onnxruntime is not installed, or there is no C++ compiler.
    """
    if to == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise ValueError(f"--to onnx: {', '.join(missing)} not installed; pip install 'panoptic-ray[export]'")
    if to == "aot":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise ValueError("--to aot: there is no C++ compiler; install g++, or name one in CXX") from error


def trace(graph: Graph) -> ExportedProgram:
    """The program of a graph, with its free axes.

    Raises:
        ValueError: something in it cannot be traced, or an axis is not free; names the graph.
    """
    try:
        return torch.export.export(graph.module, graph.arguments, dynamic_shapes=graph.shapes, strict=False)
    except Exception as error:  # torch.export documents none
        raise ValueError(f"{graph.name}: torch.export refuses it: {_first_line(error)}") from error


def _write_onnx(program: ExportedProgram, graph: Graph, file: Path, description: str | None) -> None:
    """An ONNX file with the names of the graph.

    Raises:
        ValueError: ONNX has no operator for a part of it; names the part.
    """
    names = list(graph.module(*graph.arguments))
    try:
        result = torch.onnx.export(program, input_names=list(graph.inputs), output_names=names, verbose=False)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ValueError(f"{graph.name}: ONNX cannot express it: {_first_line(error.__cause__ or error)}") from error
    assert result is not None
    if description is not None:
        result.model.metadata_props[METADATA] = description
    result.save(file)


def _compile(program: ExportedProgram, file: Path, description: str | None) -> None:
    """A package of AOTInductor.

    Raises:
        ValueError: it cannot be compiled; says why.
    """
    options: dict[str, Any] = {}
    if description is not None:
        options["aot_inductor.metadata"] = {METADATA: description}
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
    except Exception as error:  # of the compiler, which documents none
        raise ValueError(f"{file}: AOTInductor cannot compile it: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


LOUD = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")
"""Loggers of exporters."""


@contextmanager
def quiet(names: Sequence[str] = LOUD) -> Iterator[None]:
    """A context in which neither Python nor the loggers `names` warn; errors are still logged."""
    loud = [logging.getLogger(name) for name in names]
    levels = [log.level for log in loud]
    for log in loud:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loud, levels, strict=True):
            log.setLevel(level)
