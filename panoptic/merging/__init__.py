"""Merge rules: from what a network predicts to one segment a pixel.

`centres` groups pixels around centres (Panoptic-DeepLab), `overlaps` pastes instances over semantics
(Panoptic FPN, JSIS-Net, Panoptic FCN), `queries` assigns each pixel to one mask (DETR, MaskFormer).
"""
