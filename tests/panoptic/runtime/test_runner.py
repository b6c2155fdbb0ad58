"""A folder of exported graphs: what it needs, and what it says when it is none."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from panoptic.runtime import Runner

ROOT = Path(__file__).resolve().parents[3]


def test_nothing_imports_torch() -> None:
    """Whoever runs exported models installs NumPy, OpenCV, Pillow and ONNX Runtime."""
    code = """
        import sys
        sys.modules.update(dict.fromkeys(("torch", "torchvision", "timm", "scipy", "onnx", "ray", "mlflow")))
        import panoptic.runtime.__main__
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_folder_without_graphs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"network\.onnx: there is no such file; name a folder that jobs/export\.py"):
        Runner(tmp_path)


def test_a_file_that_is_no_graph(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "network.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match=r"network\.onnx: ONNX Runtime cannot open it"):
        Runner(tmp_path)


def test_a_graph_of_somebody_else(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "network.onnx")
    with pytest.raises(ValueError, match=r"network\.onnx: holds no description of a model"):
        Runner(tmp_path)
    entry = model.metadata_props.add()
    entry.key, entry.value = "panoptic", '{"format": 99}'
    onnx.save(model, tmp_path / "network.onnx")
    with pytest.raises(ValueError, match=r"is of format 99; this version reads up to 1"):
        Runner(tmp_path)


def test_without_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "network.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModuleNotFoundError, match="ONNX Runtime is not installed; pip install onnxruntime"):
        Runner(tmp_path)
