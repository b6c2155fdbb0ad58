"""Class maps that are ready to be named: `--data.class-map NAME`.

| name | from | to |
|---|---|---|
| cityscapes-categories | Cityscapes, 19 classes | its 7 categories (labels.py, catId): humans and vehicles are things |
| coco-things | the 133 classes of COCO panoptic | its 80 things, the rest void |
| cocostuff-to-coco | COCO's instances over COCO-Stuff's maps (`--data.semantic-classes cocostuff`) | the 133 of COCO |
| vistas1.2-to-cityscapes, vistas2.0-to-cityscapes | Mapillary Vistas | the 19 classes of Cityscapes |

cocostuff-to-coco is the merge of panopticapi's authors (17 merges, 12 classes removed). The two of Vistas are ours:
what Cityscapes does not annotate, or annotates otherwise (backs of signs, parking, guard rails, trailers), is void.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent

NAMES = tuple(sorted(file.stem for file in FOLDER.glob("*.json")))


def read(name: str) -> bytes:
    """The JSON of one of `NAMES`."""
    return (FOLDER / f"{name}.json").read_bytes()
