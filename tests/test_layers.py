"""Imports point one way: jobs -> pipelines -> panoptic, inside both along `ORDER`, and never in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "panoptic": (
        *(("ranges",), ("segmentation",), ("classes",), ("png",), ("rle",), ("distributed",), ("transforms",)),
        ("published",),
        *(("targets",), ("layers",), ("backbones",), ("losses",), ("matcher",), ("rcnn",), ("metrics",)),
        *(("models.base",), ("models.mask_transformer",), ("models.*",), ("models",), ("models.interface",)),
        *(
            ("training",),
            ("checkpoint",),
            ("evaluation",),
            ("convert",),
            ("visualization",),
            ("runtime",),
            ("export",),
            ("predictor",),
        ),
    ),
    "pipelines": (
        *(("cluster",), ("report",), ("data", "tracking"), ("option_help",), ("config",), ("presets",), ("training",)),
        *(("evaluation", "tuning"), ("studies",), ("serving",)),
    ),
}
"""Packages and modules, each of which may import only what stands before it; those of one group do not import each
other. `models.*` is every architecture's folder, none of which imports another; `models` is their union."""

LAYERS = {"panoptic": (), "pipelines": ("panoptic",), "jobs": ("pipelines", "panoptic"), "infra": ()}
"""Which of our packages each may import beside itself."""

LIBRARIES = {
    *("torch", "torchvision", "timm", "numpy", "scipy", "cv2", "PIL", "pycocotools", "safetensors", "annotated_types")
}
"""All that panoptic/ may import beside the standard library. annotated_types is pydantic's vocabulary of ranges, one
file without dependencies: with it the range of an option is part of its type."""

OPTIONAL = {
    **dict.fromkeys(("onnx", "onnxscript"), "panoptic.export"),
    "onnxruntime": ("panoptic.export", "panoptic.runtime"),
    "kornia_rs": "panoptic.png",
}
"""Libraries of extras, each for one or two modules of panoptic/ alone, which do without them or say what to install."""

OWNERS = {
    "tyro": "pipelines/config.py",
    "mlflow": "pipelines/tracking/",
    "boto3": "pipelines/cluster/storage.py",
    "botocore": "pipelines/cluster/storage.py",
    "tqdm": "pipelines/cluster/progress.py",
}
"""Libraries that live behind one file or folder each."""

PIPELINE_LIBRARIES = {"ray", "pyarrow", "pandas", "pydantic", *OWNERS}
"""Imported by pipelines/ alone, so that a job stays a few lines and panoptic/ runs without them."""


def source_files(root: Path, *packages: str) -> Iterator[Path]:
    """Every Python file of the packages, relative to `root`."""
    for package in packages:
        yield from sorted(path.relative_to(root) for path in (root / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """`panoptic/models/__init__.py` is `panoptic.models`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(root: Path, path: Path, at_once: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import in a file, in functions and under TYPE_CHECKING too.

    `from a.b import c` names `a.b.c` where that is a module of ours and `a.b` otherwise.

    Args:
        root: of the tree.
        path: of the file, in the tree.
        at_once: those at the top of the file alone, which run when it is imported.
    """
    package = path.parent.parts
    tree = ast.parse((root / path).read_text(encoding="utf-8"), str(path))
    for node in tree.body if at_once else ast.walk(tree):
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
    """Position in `ORDER` of a module, and the entry that stands for it; None if it has none."""
    package, _, name = module.partition(".")
    parts = name.split(".")
    for entry in (".".join(parts[:2]), f"{parts[0]}.*" if len(parts) > 1 else "", parts[0]):
        for position, group in enumerate(ORDER.get(package, ())):
            if entry in group:
                return position, entry
    return None


def order_problem(path: Path, target: str) -> str | None:
    """Why a file of panoptic/ or pipelines/ may not import the module `target` of the same package, or None."""
    source = module_name(path)
    if target == source:
        return None
    here, there = place(source), place(target)
    if here is None or there is None:
        return None  # `layer_problems` names a file without a place once, not at each import
    if here[1] == there[1] == "models.*" and source.split(".")[2] != target.split(".")[2]:
        return f"architectures never import each other: {target}"
    if here[0] == there[0] and here[1] != there[1]:
        return f"{here[1]} and {there[1]} do not import each other: {target}"
    if there[0] > here[0]:
        return f"{target} stands after {source} in the order inside {path.parts[0]}/"
    return None


def import_problem(path: Path, target: str) -> str | None:
    """Why the file may not import `target`, or None."""
    layer, library = path.parts[0], target.split(".")[0]
    if library in (*LAYERS, "tests"):
        if library != layer and library not in LAYERS[layer]:
            return f"{layer} may not import {library}"
        return order_problem(path, target) if library == layer in ORDER else None
    if library in OWNERS and layer != "panoptic" and not path.as_posix().startswith(OWNERS[library]):
        return f"only {OWNERS[library]} may import {library}"
    if library in PIPELINE_LIBRARIES and layer != "pipelines":
        return f"{library} belongs to pipelines/"
    if layer == "panoptic" and library not in LIBRARIES | set(sys.stdlib_module_names):
        if library in OPTIONAL and module_name(path).startswith(OPTIONAL[library]):
            return None
        return f"panoptic/ may not import {library}; allowed: {', '.join(sorted(LIBRARIES))}"
    return None


def circles(root: Path) -> Iterator[str]:
    """Circles of files of one layer that import each other; a package's `__init__` is what it makes public.

    A `config.py` holds options, and its functions may import the modules that read them: once they are called, both
    files are complete.
    """
    graph: dict[str, set[str]] = {}
    for path in source_files(root, *ORDER):
        if path.name != "__init__.py":
            targets = (target for _, target in imported_modules(root, path, at_once=path.name == "config.py"))
            graph[module_name(path)] = {target for target in targets if target.split(".")[0] == path.parts[0]}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> Iterator[str]:
        if module in trail:
            yield f"a circle of imports: {' -> '.join((*trail[trail.index(module) :], module))}"
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                yield from visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        yield from visit(module, ())


def layer_problems(root: Path) -> list[str]:
    """One line `file:line: reason` for each import against the arrows, module without a place, and circle."""
    problems = []
    for path in source_files(root, *LAYERS):
        if path.parts[0] in ORDER and place(module_name(path)) is None and path.name != "__init__.py":
            problems.append(f"{path}: no place in the order inside {path.parts[0]}/; add it to ORDER")
        for line, target in imported_modules(root, path):
            reason = import_problem(path, target)
            if reason is not None:
                problems.append(f"{path}:{line}: {reason}")
    return list(dict.fromkeys([*problems, *circles(root)]))


def test_imports_follow_the_arrows():
    assert layer_problems(ROOT) == []


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


LATE = (
    "timm",
    "torchvision",
    "torch._dynamo",
    "triton",
    "scipy",
    "mlflow",
    "pandas",
    "ray.data",
    "ray.train",
    "ray.tune",
)
"""Libraries that take seconds to import, or tenths of one, and that few processes need."""


def test_what_takes_long_to_import_is_imported_where_it_is_used():
    """Every command, every worker and every trial is a process of its own, which waits for its imports."""
    programs = (
        *("pipelines.training.driver", "pipelines.training.worker"),
        *("pipelines.evaluation.evaluate", "pipelines.data.prepare"),
    )
    code = f"import sys, {', '.join(programs)}; print(*sorted(set({LATE!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [], "import these inside the functions that use them"


BAD = {
    "panoptic/training/step.py": ("import ray", "ray belongs to pipelines/"),
    "panoptic/visualization.py": ("def f():\n    from pandas import DataFrame", "pandas belongs to pipelines/"),
    "panoptic/training/optim.py": (
        "import importlib\nimportlib.import_module('mlflow')",
        "mlflow belongs to pipelines/",
    ),
    "panoptic/backbones/resnet.py": ("import skimage", "panoptic/ may not import skimage"),
    "panoptic/png.py": ("from panoptic import targets", "panoptic.targets stands after panoptic.png"),
    "panoptic/losses.py": ("from .rcnn import rpn", "panoptic.rcnn stands after panoptic.losses"),
    "panoptic/targets/dense.py": (
        "from panoptic.models.detr.model import X",
        "panoptic.models.detr.model stands after",
    ),
    "panoptic/models/detr/loss.py": (
        "from panoptic.models.maskformer.model import X",
        "architectures never import each other",
    ),
    "panoptic/models/mask_transformer/loss.py": ("from panoptic.models.detr import X", "stands after"),
    "panoptic/models/base.py": ("import panoptic.models.detr.model", "panoptic.models.detr.model stands after"),
    "panoptic/metrics/report.py": ("import pipelines.data.loader", "panoptic may not import pipelines"),
    "panoptic/evaluation/oracle.py": ("import onnx", "panoptic/ may not import onnx"),
    "panoptic/utilities.py": ("", "no place in the order inside panoptic/"),
    "pipelines/helpers.py": ("", "no place in the order inside pipelines/"),
    "pipelines/training/driver.py": ("def f():\n    import tyro", "only pipelines/config.py may import tyro"),
    "pipelines/training/worker.py": (
        "from pipelines.tuning.plan import Plan",
        "pipelines.tuning.plan stands after pipelines.training.worker",
    ),
    "pipelines/tuning/sweep.py": (
        "from pipelines.evaluation import record",
        "tuning and evaluation do not import each other",
    ),
    "pipelines/data/loader.py": ("from mlflow import x", "only pipelines/tracking/ may import mlflow"),
    "pipelines/data/prepare.py": ("import boto3.session", "only pipelines/cluster/storage.py may import boto3"),
    "pipelines/data/manifest.py": ("from jobs.train import main", "pipelines may not import jobs"),
    "jobs/train.py": ("import ray", "ray belongs to pipelines/"),
    "jobs/tune.py": ("from tests.conftest import draw", "jobs may not import tests"),
    "infra/check.py": ("import panoptic", "infra may not import panoptic"),
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with one empty file at each place in the order."""
    for package, groups in ORDER.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        for entry in (entry for group in groups for entry in group):
            folder = tmp_path.joinpath(package, *entry.replace("*", "maskformer").split("."))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_the_check_sees_a_bad_import(tree: Path, name: str):
    text, reason = BAD[name]
    (tree / name).parent.mkdir(exist_ok=True, parents=True)
    (tree / name).write_text(text)
    problems = layer_problems(tree)
    assert len(problems) == 1, problems
    assert problems[0].startswith(name) and reason in problems[0]


def test_the_check_sees_a_circle_of_files(tree: Path):
    for a, b in (("rpn", "boxes"), ("boxes", "roi_align"), ("roi_align", "rpn")):
        (tree / f"panoptic/rcnn/{a}.py").write_text(f"from panoptic.rcnn.{b} import x")
    (problem,) = layer_problems(tree)
    assert "a circle of imports" in problem and "panoptic.rcnn.rpn" in problem


def test_the_check_sees_a_circle_through_a_folder_below(tree: Path):
    (tree / "pipelines/data/readers").mkdir(exist_ok=True)
    (tree / "pipelines/data/join.py").write_text("from pipelines.data.readers import cvat")
    (tree / "pipelines/data/readers/cvat.py").write_text("from pipelines.data.join import x")
    (problem,) = layer_problems(tree)
    assert "pipelines.data.join -> pipelines.data.readers.cvat -> pipelines.data.join" in problem


def test_options_may_import_what_reads_them_when_they_are_used(tree: Path):
    """`build` of a configuration imports its model, which imports the configuration; at the top it is a circle."""
    (tree / "panoptic/models/maskformer/model.py").write_text("from panoptic.models.maskformer.config import X")
    config = tree / "panoptic/models/maskformer/config.py"
    config.write_text("def build():\n    from panoptic.models.maskformer.model import Y")
    assert layer_problems(tree) == []
    config.write_text("from panoptic.models.maskformer.model import Y")
    assert ["a circle of imports" in problem for problem in layer_problems(tree)] == [True]


def test_the_check_admits_good_imports(tree: Path):
    good = {
        "panoptic/models/detr/model.py": "import torch, timm\nfrom panoptic.models.base import PanopticModel\n"
        "from panoptic import backbones, segmentation\nfrom panoptic.models.detr import loss",
        "panoptic/models/detr/loss.py": "from panoptic import losses",
        "panoptic/models/maskformer/model.py": "from panoptic.models.mask_transformer import loss",
        "panoptic/models/__init__.py": "from panoptic.models.detr.model import X",
        "panoptic/metrics/report.py": "from panoptic.rle import encode\nimport pycocotools.mask",
        "panoptic/evaluation/oracle.py": "from panoptic.metrics import report\nfrom panoptic.models import detr",
        "panoptic/export/onnx.py": "def f():\n    import onnx, onnxruntime",
        "panoptic/convert/detr.py": "from panoptic import models, training",
        "pipelines/config.py": "import tyro\nfrom panoptic.models import Architecture",
        "pipelines/tracking/runs.py": "import mlflow, ray, pandas",
        "pipelines/cluster/storage.py": "import boto3, pyarrow.fs",
        "pipelines/studies/run.py": "from pipelines.evaluation import record\nfrom pipelines.tuning import sweep",
        "jobs/train.py": "import sys\nfrom pipelines.training import driver",
    }
    (tree / "pipelines/config/__init__.py").unlink()
    (tree / "pipelines/config").rmdir()
    for name, text in good.items():
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_text(text)
    assert layer_problems(tree) == []
