"""The table of published weights, by name: file, licence, classes, size and PQ. `panoptic.convert.hub` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from panoptic.transforms import Resize

PREFIX = "hub:"
"""The prefix of a source that is a name of the table."""


@dataclass(frozen=True)
class Published:
    """A checkpoint that its authors published."""

    source: str
    """The project, a key of `panoptic.convert.FAMILIES`."""
    classes: str
    """The classes of its head: a file of `panoptic.classes`."""
    page: str
    """The page that lists the file."""
    licence: str
    """The terms under which that page gives the weights away."""
    pq: float
    """From that page: PQ on the validation images of the data set, without test-time augmentation."""
    resize: Resize
    """The size at which it was evaluated there."""
    url: str = ""
    """The file itself; "" = it is behind a page with buttons, and downloaded by hand."""
    digest: str = ""
    """The published part of the file's digest, "md5:" or "sha256:" and its first digits; "" = nothing."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the configuration that the weights do not tell, by their path."""

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.url.rsplit("/", 1)[-1] if self.url else "model.pth"


def listing() -> list[list[str]]:
    """Name, classes, PQ and licence of every published model, as rows under a head."""
    head = ["name", "classes", "PQ", "licence of the weights", "file"]
    rows = [
        [PREFIX + name, one.classes, f"{one.pq:.1f}", one.licence, "" if one.url else "by hand"]
        for name, one in PUBLISHED.items()
    ]
    return [head, *rows]


COCO = Resize(short=800, longest=1333, antialias=True)

DETR = Resize(short=800, longest=1333, rule="detr", antialias=True)

STREET = Resize(short=1024, longest=2048, antialias=True)

ADE20K = Resize(short=640, longest=2560, antialias=True)

VISTAS = Resize(short=2048, longest=2048, antialias=True)

SHARE_ALIKE = "CC BY-SA 3.0"

NOT_COMMERCIAL = "CC BY-NC 4.0, not for commercial use"

APACHE = "Apache-2.0 (the project; its page names no other for the weights)"

MIT = "MIT (the project; its page names no other for the weights)"

GPL = "GPL-3.0 for academic use (the project); for other use ask its authors"

META = "https://dl.fbaipublicfiles.com/"

DETECTRON2 = "https://github.com/facebookresearch/detectron2/blob/main/"

EFFICIENTPS = "https://github.com/DeepSceneSeg/EfficientPS"

PANOPTIC_FCN = "https://github.com/dvlab-research/PanopticFCN"

STANDALONE = "https://github.com/bowenc0221/panoptic-deeplab/blob/master/tools/docs/MODEL_ZOO.md"


def _panoptic_deeplab(classes: str, pq: float, resize: Resize, path: str) -> Published:
    page = f"{DETECTRON2}projects/Panoptic-DeepLab/README.md"
    return Published(
        "detectron2", classes, page, SHARE_ALIKE, pq, resize, f"{META}detectron2/PanopticDeepLab/{path}.pkl"
    )


def _panoptic_fpn(pq: float, path: str) -> Published:
    url = f"{META}detectron2/COCO-PanopticSegmentation/{path}.pkl"
    return Published("detectron2", "coco", f"{DETECTRON2}MODEL_ZOO.md", SHARE_ALIKE, pq, COCO, url, _md5(path))


def _detr(pq: float, name: str, digits: str, **changes: Any) -> Published:
    url, page = f"{META}detr/{name}-{digits}.pth", "https://github.com/facebookresearch/detr"
    return Published("detr", "coco", page, APACHE, pq, DETR, url, f"sha256:{digits}", changes)


def _maskformer(classes: str, pq: float, resize: Resize, path: str) -> Published:
    page = "https://github.com/facebookresearch/MaskFormer/blob/main/MODEL_ZOO.md"
    url = f"{META}maskformer/{path}.pkl"
    return Published("maskformer", classes, page, NOT_COMMERCIAL, pq, resize, url, _md5(path))


def _mask2former(classes: str, pq: float, resize: Resize, path: str) -> Published:
    page = "https://github.com/facebookresearch/Mask2Former/blob/main/MODEL_ZOO.md"
    url = f"{META}maskformer/mask2former/{path}.pkl"
    return Published("mask2former", classes, page, NOT_COMMERCIAL, pq, resize, url, _md5(path))


def _eomt(classes: str, pq: float, side: int, name: str) -> Published:
    resize = Resize(short=side, longest=side, rule="half_even", canvas=(side, side), antialias=True)
    page = "https://github.com/tue-mps/eomt/blob/master/model_zoo/dinov2.md"
    url = f"https://huggingface.co/tue-mps/{name}/resolve/main/pytorch_model.bin"
    return Published("eomt", classes, page, MIT, pq, resize, url)


def _md5(path: str) -> str:
    """The digits at the end of the names of detectron2's files."""
    return f"md5:{path.rsplit('_', 1)[-1]}"


_DEEPLAB = "panoptic_deeplab_R_52_os16_mg124_poly"

_COCO2, _STREET2 = "coco/panoptic/maskformer2", "cityscapes/panoptic/maskformer2"

PUBLISHED: dict[str, Published] = {
    "panoptic-deeplab-r52-cityscapes": _panoptic_deeplab(
        *("cityscapes", 60.3, Resize()),
        f"Cityscapes-PanopticSegmentation/{_DEEPLAB}_90k_bs32_crop_512_1024_dsconv/model_final_23d03a",
    ),
    "panoptic-deeplab-r52-conv-cityscapes": _panoptic_deeplab(
        "cityscapes", 60.3, Resize(), f"Cityscapes-PanopticSegmentation/{_DEEPLAB}_90k_bs32/model_final_bd324a"
    ),
    "panoptic-deeplab-r52-coco": _panoptic_deeplab(
        *("coco", 35.5, Resize(short=640, longest=640)),
        f"COCO-PanopticSegmentation/{_DEEPLAB}_200k_bs64_crop_640_640_coco_dsconv/model_final_5e6da2",
    ),
    "panoptic-deeplab-r50-cityscapes": Published(
        "panoptic-deeplab", "cityscapes", STANDALONE, APACHE, 59.8, Resize(canvas=(1025, 2049))
    ),
    "panoptic-deeplab-r101-cityscapes": Published(
        "panoptic-deeplab", "cityscapes", STANDALONE, APACHE, 60.3, Resize(canvas=(1025, 2049))
    ),
    "panoptic-fpn-r50-1x-coco": _panoptic_fpn(39.4, "panoptic_fpn_R_50_1x/139514544/model_final_dbfeb4"),
    "panoptic-fpn-r50-coco": _panoptic_fpn(41.5, "panoptic_fpn_R_50_3x/139514569/model_final_c10459"),
    "panoptic-fpn-r101-coco": _panoptic_fpn(43.0, "panoptic_fpn_R_101_3x/139514519/model_final_cafdb1"),
    "efficientps-b5-cityscapes": Published("efficientps", "cityscapes", EFFICIENTPS, GPL, 64.4, Resize()),
    "panoptic-fcn-r50-coco": Published("panopticfcn", "coco", PANOPTIC_FCN, APACHE, 41.1, COCO),
    "panoptic-fcn-r50-coco-600": Published(
        *("panopticfcn", "coco", PANOPTIC_FCN, APACHE, 42.7), Resize(short=600, longest=1000, antialias=True)
    ),
    "panoptic-fcn-r50-coco-3x": Published("panopticfcn", "coco", PANOPTIC_FCN, APACHE, 43.6, COCO),
    "panoptic-fcn-star-r50-coco": Published("panopticfcn", "coco", PANOPTIC_FCN, APACHE, 44.2, COCO),
    "detr-r50-coco": _detr(43.4, "detr-r50-panoptic", "00ce5173"),
    "detr-r50-dc5-coco": _detr(44.6, "detr-r50-dc5-panoptic", "da08f1b1", **{"backbone.output_stride": 16}),
    "detr-r101-coco": _detr(45.1, "detr-r101-panoptic", "40021d53"),
    **{
        f"maskformer-{name}-coco": _maskformer("coco", pq, COCO, f"panoptic-coco/maskformer_panoptic_{path}")
        for name, pq, path in (
            ("r50", 46.5, "R50_bs64_554k/model_final_6f60dc"),
            ("r101", 47.6, "R101_bs64_554k/model_final_57b049"),
            ("swin-tiny", 47.7, "swin_tiny_bs64_554k/model_final_539394"),
            ("swin-small", 49.7, "swin_small_bs64_554k/model_final_5bf6b1"),
            ("swin-base", 51.8, "swin_base_IN21k_384_bs64_554k/model_final_4b7f49"),
            ("swin-large", 52.7, "swin_large_IN21k_384_bs64_554k/model_final_7505c4"),
        )
    },
    "maskformer-r50-ade20k": _maskformer(
        "ade20k", 34.7, ADE20K, "panoptic-ade20k/maskformer_panoptic_R50_bs16_720k/model_final_7aa977"
    ),
    "maskformer-r101-ade20k": _maskformer(
        "ade20k", 35.7, ADE20K, "panoptic-ade20k/maskformer_panoptic_R101_bs16_720k/model_final_0b3cc8"
    ),
    **{
        f"mask2former-{name}-coco": _mask2former("coco", pq, COCO, f"{_COCO2}_{path}")
        for name, pq, path in (
            ("r50", 51.9, "R50_bs16_50ep/model_final_94dc52"),
            ("r101", 52.6, "R101_bs16_50ep/model_final_b807bd"),
            ("swin-tiny", 53.2, "swin_tiny_bs16_50ep/model_final_9fd0ae"),
            ("swin-small", 54.6, "swin_small_bs16_50ep/model_final_a407fd"),
            ("swin-base-in1k", 55.1, "swin_base_384_bs16_50ep/model_final_9d7f02"),
            ("swin-base", 56.4, "swin_base_IN21k_384_bs16_50ep/model_final_54b88a"),
            ("swin-large", 57.8, "swin_large_IN21k_384_bs16_100ep/model_final_f07440"),
        )
    },
    **{
        f"mask2former-{name}-cityscapes": _mask2former("cityscapes", pq, STREET, f"{_STREET2}_{path}")
        for name, pq, path in (
            ("r50", 62.1, "R50_bs16_90k/model_final_4ab90c"),
            ("r101", 62.4, "R101_bs16_90k/model_final_04d286"),
            ("swin-tiny", 63.9, "swin_tiny_bs16_90k/model_final_ceba0f"),
            ("swin-small", 64.8, "swin_small_bs16_90k/model_final_23efb7"),
            ("swin-base", 66.1, "swin_base_IN21k_384_bs16_90k/model_final_fa840f"),
            ("swin-large", 66.6, "swin_large_IN21k_384_bs16_90k/model_final_064788"),
        )
    },
    "mask2former-r50-ade20k": _mask2former(
        "ade20k", 39.7, ADE20K, "ade20k/panoptic/maskformer2_R50_bs16_160k/model_final_5c90d4"
    ),
    "mask2former-swin-large-ade20k": _mask2former(
        "ade20k", 48.1, ADE20K, "ade20k/panoptic/maskformer2_swin_large_IN21k_384_bs16_160k/model_final_e0c58e"
    ),
    "mask2former-r50-mapillary": _mask2former(
        "mapillary_v1.2", 36.3, VISTAS, "mapillary_vistas/panoptic/maskformer_R50_bs16_300k/model_final_4e9874"
    ),
    "mask2former-swin-large-mapillary": _mask2former(
        *("mapillary_v1.2", 45.5, VISTAS),
        "mapillary_vistas/panoptic/maskformer2_swin_large_IN21k_384_bs16_300k/model_final_132c71",
    ),
    "eomt-small-coco": _eomt("coco", 46.7, 640, "coco_panoptic_eomt_small_640_2x"),
    "eomt-base-coco": _eomt("coco", 51.6, 640, "coco_panoptic_eomt_base_640_2x"),
    "eomt-large-coco": _eomt("coco", 56.0, 640, "coco_panoptic_eomt_large_640"),
    "eomt-giant-coco": _eomt("coco", 57.0, 640, "coco_panoptic_eomt_giant_640"),
    "eomt-large-1280-coco": _eomt("coco", 58.3, 1280, "coco_panoptic_eomt_large_1280"),
    "eomt-giant-1280-coco": _eomt("coco", 59.2, 1280, "coco_panoptic_eomt_giant_1280"),
    "eomt-large-ade20k": _eomt("ade20k", 50.6, 640, "ade20k_panoptic_eomt_large_640"),
    "eomt-giant-ade20k": _eomt("ade20k", 51.3, 640, "ade20k_panoptic_eomt_giant_640"),
    "eomt-large-1280-ade20k": _eomt("ade20k", 51.7, 1280, "ade20k_panoptic_eomt_large_1280"),
    "eomt-giant-1280-ade20k": _eomt("ade20k", 52.8, 1280, "ade20k_panoptic_eomt_giant_1280"),
}
"""Every published checkpoint by its name."""
