"""The EXIF orientation of a photograph, which readers and the check of photographs ask for."""

from __future__ import annotations

import io

import PIL.Image

EXIF_MARKS = (b"Exif", b"eXIf", b"EXIF")
"""Marks of EXIF, of which a JPEG, PNG or WebP with an orientation holds one."""


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1 where it has none. From 5 on, height and width are exchanged."""
    if not any(mark in data for mark in EXIF_MARKS) and not data.startswith((b"II*\0", b"MM\0*")):
        return 1
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(274, 1)
    except (OSError, ValueError, SyntaxError):  # a file that cannot be read at all is told by who decodes it
        return 1
    return orientation if orientation in range(1, 9) else 1
