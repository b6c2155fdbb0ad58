"""The embedded data set: drawn scenes as an ordinary COCO-panoptic folder, with exact ground truth.

A scene is composed back to front: sky, mountains, ground, water, road, then things by their distance,
then what nobody labels (letterbox, bonnet, smear). Every object is drawn into the image and, from the
same polygons, into the map of segments: a pixel belongs to what covers at least half of it. Shadows, haze
and noise touch the image only. Image `index` of a split depends on (seed, split, index) alone, whatever
the number of processes and of images.

`drawing` (canvas, textures, polygons) · `things` and `stuff` (what is drawn) · `compose` (where) · `files`.
"""

from pipelines.data.scenes.compose import render
from pipelines.data.scenes.files import CATEGORIES, write_scenes

__all__ = ["CATEGORIES", "render", "write_scenes"]
