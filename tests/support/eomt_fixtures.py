"""Reference numbers of EoMT (fixtures/eomt): arrays, weights by their rule, images, targets, draws."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = "fixtures/eomt"


def rules(shared: Callable[[str], Path]) -> Any:
    """The module that defines the fixtures."""
    spec = importlib.util.spec_from_file_location("eomt_rules", shared(f"{PATH}/rules.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(shared: Callable[[str], Path], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays of a file as tensors, and what it says about them."""
    arrays, meta = rules(shared).load(name)
    return {key: torch.from_numpy(value) for key, value in arrays.items()}, meta
