"""Trained models as files for other runtimes: ONNX, `torch.export` programs, AOTInductor packages.

`write` makes a folder of graphs; `panoptic.runtime` runs those of ONNX without torch.
"""

from panoptic.export.check import differences
from panoptic.export.quantise import quantise
from panoptic.export.writer import FORMATS, Format, check_tools, write

__all__ = ["FORMATS", "Format", "check_tools", "differences", "quantise", "write"]
