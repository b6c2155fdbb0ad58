"""Imports point one way: jobs -> pipelines -> panoptic, and inside panoptic along `ORDER`."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER = (
    *("segmentation", "png", "colour", "windows", "policies", "transforms"),
    *("targets.instances", "targets.pixels", "targets"),
    *("layers", "class_space", "resnet", "res2net", "vgg", "swin", "timm_backbone", "trunk_weights"),
    *("backbones", "pyramid", "towers", "attention", "deformable_attention", "pixel_decoders", "mask_head"),
    *("proposals", "losses", "kernels", "points", "matching", "merging", "mask_classification"),
    *("models.interface", "models.*", "models"),
    *("metrics.regions", "metrics.instances", "metrics.quality", "metrics.boundary", "metrics.image"),
    *("metrics.report", "metrics.bootstrap", "oracle"),
    *("freezing", "optim", "engine", "evaluation", "checkpoint", "export", "convert", "draw"),
)
"""Modules of panoptic/, each of which may import only what stands before it. `models.*` is every
architecture, none of which imports another; `models` is their union. A package such as `convert/`
takes the place of the module of that name."""

LAYERS = {"panoptic": (), "pipelines": ("panoptic",), "jobs": ("pipelines", "panoptic"), "infra": ()}
"""Which of our packages each may import beside itself."""

LIBRARIES = {"torch", "torchvision", "timm", "numpy", "scipy", "cv2", "pycocotools", "safetensors"}
"""All that panoptic/ may import beside the standard library."""

OPTIONAL = {
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "panoptic.export"),
    "faster_coco_eval": "panoptic.metrics.instances",
}
"""Libraries of extras, each for one module of panoptic/ alone, which does without them or says what to install."""

OWNERS = {
    "tyro": ("pipelines/config.py",),
    "mlflow": ("pipelines/tracking.py", "pipelines/mlflow_model.py", "pipelines/registry.py"),
    "boto3": ("pipelines/storage.py",),
    "botocore": ("pipelines/storage.py",),
}
"""Libraries that live behind one file each."""

PIPELINE_LIBRARIES = {"ray", "pyarrow", "pandas", *OWNERS}
"""Imported by pipelines/ alone, so that a job stays a few lines and panoptic/ runs without them."""

FILE_LINES = 400
FUNCTION_LINES = 80


def source_files(root: Path, *packages: str) -> Iterator[Path]:
    """Every Python file of the packages, relative to `root`."""
    for package in packages:
        yield from sorted(path.relative_to(root) for path in (root / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """`panoptic/models/__init__.py` is `panoptic.models`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import in a file, in functions and under TYPE_CHECKING too.

    `from a.b import c` names `a.b.c` where that is a module of ours and `a.b` otherwise.
    """
    package = path.parent.parts
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            for alias in node.names:
                inner = root.joinpath(*base.split("."), alias.name)
                ours = inner.with_suffix(".py").exists() or (inner / "__init__.py").exists()
                yield node.lineno, f"{base}.{alias.name}" if ours else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def place(module: str) -> tuple[int, str] | None:
    """Position in `ORDER` of a module of panoptic, and the entry that stands for it; None if it has none."""
    name = module.removeprefix("panoptic.")
    parent = name.split(".")[0]
    return next(((ORDER.index(entry), entry) for entry in (name, f"{parent}.*", parent) if entry in ORDER), None)


def order_problem(path: Path, target: str) -> str | None:
    """Why a file of panoptic/ may not import the module `target` of panoptic, or None."""
    source = module_name(path)
    if target == source:
        return None
    if source in ("panoptic", "panoptic.metrics"):
        return f"{source} must import nothing of ours: it runs before every module in it"
    here, there = place(source), place(target)
    if here is None or there is None:
        return None  # `layer_problems` names a file without a place once, not at each import
    if here[1] == there[1] == "models.*":
        return f"models never import each other: {target}"
    if there[0] > here[0]:
        return f"{target} stands after {source} in the order inside panoptic/"
    return None


def import_problem(path: Path, target: str) -> str | None:
    """Why the file may not import `target`, or None."""
    layer, library = path.parts[0], target.split(".")[0]
    if library in (*LAYERS, "tests"):
        if library != layer and library not in LAYERS[layer]:
            return f"{layer} may not import {library}"
        return order_problem(path, target) if library == layer == "panoptic" else None
    if library in OWNERS and layer != "panoptic" and path.as_posix() not in OWNERS[library]:
        return f"only {' and '.join(OWNERS[library])} may import {library}"
    if library in PIPELINE_LIBRARIES and layer != "pipelines":
        return f"{library} belongs to pipelines/"
    if layer == "panoptic" and library not in LIBRARIES | set(sys.stdlib_module_names):
        if library in OPTIONAL and module_name(path).startswith(OPTIONAL[library]):
            return None
        return f"panoptic/ may not import {library}; allowed: {', '.join(sorted(LIBRARIES))}"
    return None


def layer_problems(root: Path) -> list[str]:
    """One line `file:line: reason` for each import against the arrows, and for each module without a place."""
    problems = []
    for path in source_files(root, *LAYERS):
        if path.parts[0] == "panoptic" and place(module_name(path)) is None and path.name != "__init__.py":
            problems.append(f"{path}: no place in the order inside panoptic/; add it to ORDER where it belongs")
        for line, target in imported_modules(root, path):
            reason = import_problem(path, target)
            if reason is not None:
                problems.append(f"{path}:{line}: {reason}")
    return list(dict.fromkeys(problems))


def size_problems(root: Path) -> list[str]:
    """One line for each file and each function that outgrew its limit."""
    problems = []
    for path in source_files(root, *LAYERS, "tests"):
        text = (root / path).read_text(encoding="utf-8")
        if (lines := len(text.splitlines())) > FILE_LINES:
            problems.append(f"{path}: {lines} lines, at most {FILE_LINES}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    problems.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}")
    return problems


def test_imports_follow_the_arrows():
    assert layer_problems(ROOT) == []


def test_files_and_functions_stay_small():
    assert size_problems(ROOT) == []


def test_panoptic_imports_without_the_pipeline_libraries():
    modules = [module_name(path) for path in source_files(ROOT, "panoptic")]
    blocked = sorted(PIPELINE_LIBRARIES)
    code = f"""
        import importlib, sys
        sys.modules.update(dict.fromkeys({blocked!r}))
        for name in {modules!r}:
            importlib.import_module(name)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BAD = {
    "panoptic/engine.py": ("import ray", "ray belongs to pipelines/"),
    "panoptic/draw.py": ("def f():\n    from pandas import DataFrame", "pandas belongs to pipelines/"),
    "panoptic/optim.py": ("import importlib\nimportlib.import_module('mlflow')", "mlflow belongs to pipelines/"),
    "panoptic/resnet.py": ("from PIL import Image", "panoptic/ may not import PIL"),
    "panoptic/png.py": ("from panoptic import targets", "panoptic.targets stands after panoptic.png"),
    "panoptic/losses.py": ("from .merging import merge", "panoptic.merging stands after panoptic.losses"),
    "panoptic/targets.py": ("from panoptic.models.detr import X", "panoptic.models.detr stands after"),
    "panoptic/models/detr.py": ("from .maskformer import X", "models never import each other"),
    "panoptic/models/interface.py": ("from panoptic.models import detr", "panoptic.models.detr stands after"),
    "panoptic/metrics/quality.py": ("from . import report", "panoptic.metrics.report stands after"),
    "panoptic/metrics/__init__.py": ("from panoptic.metrics import quality", "must import nothing of ours"),
    "panoptic/merging.py": ("import pipelines.feed", "panoptic may not import pipelines"),
    "panoptic/oracle.py": ("import onnx", "panoptic/ may not import onnx"),
    "panoptic/utilities.py": ("", "no place in the order inside panoptic/"),
    "pipelines/train.py": ("def f():\n    import tyro", "only pipelines/config.py may import tyro"),
    "pipelines/feed.py": (
        "from mlflow import x",
        "only pipelines/tracking.py and pipelines/mlflow_model.py and pipelines/registry.py may import",
    ),
    "pipelines/shards.py": ("import boto3.session", "only pipelines/storage.py may import boto3"),
    "pipelines/sources.py": ("from jobs.train import main", "pipelines may not import jobs"),
    "jobs/train.py": ("import ray", "ray belongs to pipelines/"),
    "jobs/tune.py": ("from tests.conftest import draw", "jobs may not import tests"),
    "infra/check.py": ("import panoptic", "infra may not import panoptic"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one empty file at each place in the order."""
    for entry in ORDER:
        name = entry.replace("*", "maskformer").replace(".", "/")
        path = tmp_path / "panoptic" / (f"{name}/__init__.py" if entry == "models" else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("panoptic/models/detr.py", "panoptic/metrics/__init__.py", "panoptic/__init__.py"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_the_check_sees_a_bad_import(tree: Path, name: str):
    text, reason = BAD[name]
    (tree / name).parent.mkdir(exist_ok=True)
    (tree / name).write_text(text)
    problems = layer_problems(tree)
    assert len(problems) == 1, problems
    assert problems[0].startswith(name) and reason in problems[0]


def test_the_check_admits_good_imports(tree: Path):
    good = {
        "panoptic/models/detr.py": "import torch, timm\nfrom panoptic.models.interface import PanopticModel\n"
        "from panoptic import backbones, segmentation",
        "panoptic/models/__init__.py": "from panoptic.models.detr import X\nfrom panoptic.models.maskformer import Y",
        "panoptic/metrics/quality.py": "from panoptic.metrics.regions import runs\nimport pycocotools.mask",
        "panoptic/oracle.py": "from panoptic.metrics import quality\nfrom panoptic.models import detr",
        "panoptic/export.py": "def f():\n    import onnx, onnxruntime",
        "panoptic/convert/__init__.py": "from panoptic.convert import keys",
        "panoptic/convert/keys.py": "from panoptic import models, checkpoint",
        "pipelines/config.py": "import tyro\nfrom panoptic.models import Architecture",
        "pipelines/tracking.py": "import mlflow, ray, pandas",
        "pipelines/storage.py": "import boto3, pyarrow.fs",
        "jobs/train.py": "import sys\nfrom pipelines import train",
    }
    (tree / "panoptic/convert.py").unlink()
    for name, text in good.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(text)
    assert layer_problems(tree) == []


def test_the_check_sees_what_is_too_long(tree: Path):
    body = "\n".join(f"    x{i} = {i}" for i in range(FUNCTION_LINES))
    (tree / "panoptic/draw.py").write_text(f"def long():\n{body}\n")
    (tree / "panoptic/png.py").write_text("x = 1\n" * (FILE_LINES + 1))
    assert size_problems(tree) == [
        f"panoptic/draw.py:1: long has {FUNCTION_LINES + 1} lines, at most {FUNCTION_LINES}",
        f"panoptic/png.py: {FILE_LINES + 1} lines, at most {FILE_LINES}",
    ]
