"""The peers' own code, loaded file by file from source folders; nothing of it is copied here.

The packages' imports reach for much that the measured functions never call (fvcore, detectron2's compiled part), so
single files are executed by path, with small stand-ins for what their import lines name.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional
from torch.nn.functional import interpolate

from panoptic.losses import box_corners

PROJECT = "detectron2/projects/Panoptic-DeepLab/panoptic_deeplab"

MERGE = "panoptic_inference"
"""Of Mask2Former's model."""


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


def hotcoco(folder: Path | None) -> ModuleType | None:
    """`hotcoco.panoptic` of FOLDER/site-packages (or of the installed package); None where it is not found."""
    site = folder / "site-packages" if folder else None
    if site is not None and (site / "hotcoco").is_dir() and str(site) not in sys.path:
        sys.path.append(str(site))
    if importlib.util.find_spec("hotcoco") is None:
        return None
    return importlib.import_module("hotcoco.panoptic")


def cityscapes(folder: Path | None) -> ModuleType | None:
    """The panoptic evaluation of FOLDER/cityscapesScripts (or of the installed package); None where it is not found."""
    file = "evaluation/evalPanopticSemanticLabeling.py"
    root = folder / "cityscapesScripts" / "cityscapesscripts" if folder else None
    if root is None or not (root / file).is_file():
        found = importlib.util.find_spec("cityscapesscripts")
        if found is None or not found.submodule_search_locations:
            return None
        root = Path(found.submodule_search_locations[0])
    helpers, labels = (ModuleType(f"cityscapesscripts.helpers.{name}") for name in ("csHelpers", "labels"))
    helpers.printError, labels.labels = print, []  # type: ignore[attr-defined]
    packages = {name: ModuleType(name) for name in ("cityscapesscripts", "cityscapesscripts.helpers")}
    return _load(root / file, {**packages, helpers.__name__: helpers, labels.__name__: labels})


def post_processing(folder: Path | None) -> ModuleType | None:
    """The merge of detectron2's Panoptic-DeepLab project."""
    return _find(folder, f"{PROJECT}/post_processing.py")


def target_generator(folder: Path | None) -> ModuleType | None:
    """The targets of detectron2's Panoptic-DeepLab project."""
    return _find(folder, f"{PROJECT}/target_generator.py")


def transforms(folder: Path | None) -> ModuleType | None:
    """detectron2's transforms on PIL; only `ResizeTransform` works under the stand-in for fvcore."""
    return _find(folder, "detectron2/detectron2/data/transforms/transform.py", _fvcore())


def detr(folder: Path | None) -> ModuleType | None:
    """facebookresearch/detr's masks and post-processors; its classes that need the rest of it do not work."""
    utils = panopticapi_utils(found) if (found := panopticapi(folder)) else None
    if utils is None:
        return None
    names = {"util": (), "util.box_ops": (), "util.misc": ("NestedTensor", "nested_tensor_from_tensor_list")}
    modules = {name: ModuleType(name) for name in names}
    for name, needed in names.items():
        for attribute in needed:
            setattr(modules[name], attribute, type(attribute, (), {}))
    modules["util.misc"].interpolate = interpolate  # type: ignore[attr-defined]
    modules["util.box_ops"].box_cxcywh_to_xyxy = box_corners  # type: ignore[attr-defined]
    modules["util"].box_ops = modules["util.box_ops"]  # type: ignore[attr-defined]
    package = {"panopticapi": ModuleType("panopticapi"), "panopticapi.utils": utils}
    return _find(folder, "detr/models/segmentation.py", modules | package)


def transformers() -> ModuleType | None:
    """Hugging Face's package where it is installed."""
    return importlib.import_module("transformers") if importlib.util.find_spec("transformers") else None


def mask_ops(folder: Path | None) -> ModuleType | None:
    """detectron2's pasting of masks."""
    return _find(folder, "detectron2/detectron2/layers/mask_ops.py")


def panoptic_merge(folder: Path | None) -> Callable[..., Any] | None:
    """`combine_semantic_and_instance_outputs` of detectron2's Panoptic FPN, without the rest of its file."""
    name = "combine_semantic_and_instance_outputs"
    file = folder / "detectron2/detectron2/modeling/meta_arch/panoptic_fpn.py" if folder else None
    if file is None or not file.is_file():
        return None
    module = ast.parse(file.read_text(encoding="utf-8"), str(file))
    module.body = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name]
    names: dict[str, Any] = {"torch": torch}
    exec(compile(module, str(file), "exec"), names)
    return names[name]


def mask2former(folder: Path | None) -> Callable[..., Any] | None:
    """`panoptic_inference` of facebookresearch/Mask2Former's model, without the rest of its file; takes a `self`."""
    file = folder / "Mask2Former/mask2former/maskformer_model.py" if folder else None
    if file is None or not file.is_file():
        return None
    module = ast.parse(file.read_text(encoding="utf-8"), str(file))
    found = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == MERGE]
    module.body = [*found]
    names: dict[str, Any] = {"torch": torch, "F": functional}
    exec(compile(module, str(file), "exec"), names)
    return names[MERGE]


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
