"""Exported models on ONNX Runtime, NumPy and OpenCV, without torch.

    from panoptic.runtime import run
    result = run("street-onnx", "photo.jpg")        # a folder that `jobs/export.py MODEL --to onnx` wrote

`python -m panoptic.runtime street-onnx photo.jpg --out photo-segmented.jpg` does the same. Graphs end where decisions
about single segments begin; these follow the rules of the models' `postprocess` here, one file an architecture:
`queries` (MaskFormer, Mask2Former, EoMT), `deeplab`, `detr`, `fcn`, and those that look into regions, `fpn`,
`efficientps` and `jsis`, on `regions`. Nothing in this package imports torch, nor does anything that it imports.
"""

from panoptic.runtime.runner import Runner, run

__all__ = ["Runner", "run"]
