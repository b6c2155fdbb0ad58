"""The peers' own code, loaded file by file from source folders; nothing of it is copied here.

The packages' imports reach for much that the measured functions never call (fvcore, detectron2's compiled part), so
single files are executed by path, with small stand-ins for what their import lines name.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT = "detectron2/projects/Panoptic-DeepLab/panoptic_deeplab"


def panopticapi(folder: Path | None) -> ModuleType | None:
    """`panopticapi.evaluation` of FOLDER/panopticapi (or of the installed package); None where it is not found."""
    root = folder / "panopticapi" / "panopticapi" if folder else None
    if root is None or not root.is_dir():
        found = importlib.util.find_spec("panopticapi")
        if found is None or not found.submodule_search_locations:
            return None
        root = Path(found.submodule_search_locations[0])
    utils = _load(root / "utils.py", {})
    return _load(root / "evaluation.py", {"panopticapi": ModuleType("panopticapi"), "panopticapi.utils": utils})


def panopticapi_utils(module: ModuleType) -> ModuleType:
    """`panopticapi.utils` beside what `panopticapi` returned."""
    return _load(Path(str(module.__file__)).with_name("utils.py"), {})


def post_processing(folder: Path | None) -> ModuleType | None:
    """The merge of detectron2's Panoptic-DeepLab project."""
    return _find(folder, f"{PROJECT}/post_processing.py")


def target_generator(folder: Path | None) -> ModuleType | None:
    """The targets of detectron2's Panoptic-DeepLab project."""
    return _find(folder, f"{PROJECT}/target_generator.py")


def transforms(folder: Path | None) -> ModuleType | None:
    """detectron2's transforms on PIL; only `ResizeTransform` works under the stand-in for fvcore."""
    return _find(folder, "detectron2/detectron2/data/transforms/transform.py", _fvcore())


def _find(folder: Path | None, path: str, stand_ins: Mapping[str, ModuleType] | None = None) -> ModuleType | None:
    if folder is None or not (folder / path).is_file():
        return None
    return _load(folder / path, stand_ins or {})


def _load(file: Path, stand_ins: Mapping[str, ModuleType]) -> ModuleType:
    name = f"peer_{file.parent.name}_{file.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file}: cannot be loaded as Python; --peers names the folder that holds the clones")
    module = importlib.util.module_from_spec(spec)
    with _standing_in(stand_ins):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _standing_in(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _fvcore() -> dict[str, ModuleType]:
    """What the import line of detectron2's transform.py names: a base class that keeps arguments as attributes."""

    class Transform:
        def _set_attributes(self, values: Mapping[str, Any]) -> None:
            self.__dict__.update({k: v for k, v in values.items() if k not in ("self", "__class__")})

        @classmethod
        def register_type(cls, *_: object) -> None:
            """Additional data types, which nothing here has."""

    names = ["fvcore", "fvcore.transforms", "fvcore.transforms.transform"]
    modules = {name: ModuleType(name) for name in names}
    for name in ("CropTransform", "HFlipTransform", "NoOpTransform", "TransformList"):
        setattr(modules[names[-1]], name, type(name, (Transform,), {}))
    modules[names[-1]].Transform = Transform  # type: ignore[attr-defined]
    return modules
