"""The list of presets that a new user sees."""

from __future__ import annotations

from pipelines.presets import PRESETS
from pipelines.presets.listing import listing


def test_every_preset_has_a_row_under_its_architecture() -> None:
    text = listing(PRESETS)
    titles = [line for line in text.splitlines() if line and not line.startswith("|")]
    assert {"PanopticDeepLab", "Mask2Former", "EfficientPS"} <= set(titles)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    rows = {row[0]: row[1:] for row in cells}
    assert PRESETS.keys() <= rows.keys()
    assert rows["demo"][:3] == ["cpu", "1,200 x 8", "56.6"]
    assert rows["mask2former-pedestrians"][2] == "74.3"
    assert rows["panoptic-deeplab-r50-cityscapes"][:3] == ["8 GPUs", "90,000 x 8", "59.0"]
    assert rows["efficientps-scenes"][2] == "31.8" and rows["eomt-large-cityscapes"][2] == "-"
