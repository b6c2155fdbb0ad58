"""Small trees of files for tests of readers, as folders and as the zips of their owners."""

from __future__ import annotations

import zipfile
from pathlib import Path

import cv2
import numpy as np


def png(pixels: np.ndarray) -> bytes:
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGBA2BGRA if pixels.shape[2] == 4 else cv2.COLOR_RGB2BGR)
    return cv2.imencode(".png", pixels)[1].tobytes()


def photograph(height: int = 4, width: int = 6) -> bytes:
    return png(np.full((height, width, 3), 99, np.uint8))


def put(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


CITY_FILES = {
    "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png": photograph(),
    "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png": png(np.full((4, 6), 26001, np.uint16)),
    "leftImg8bit/train/bochum/bochum_000000_000313_leftImg8bit.png": photograph(),
    "gtFine/train/bochum/bochum_000000_000313_gtFine_instanceIds.png": png(np.full((4, 6), 7, np.uint16)),
    "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png": photograph(),
    "gtFine/test/berlin/berlin_000000_000019_gtFine_instanceIds.png": png(np.full((4, 6), 3, np.uint16)),
}


def zipped(root: Path, files: dict[str, bytes]) -> Path:
    """The zips of the owner: one for each folder at the top."""
    root.mkdir(parents=True)
    for top in {path.split("/")[0] for path in files}:
        with zipfile.ZipFile(root / f"{top}.zip", "w", zipfile.ZIP_DEFLATED) as file:
            for path, data in files.items():
                if path.startswith(f"{top}/"):
                    file.writestr(path, data)
                    file.writestr(f"__MACOSX/{path.rsplit('/', 1)[0]}/._{path.rsplit('/', 1)[1]}", b"junk")
    return root
