"""Panoptic FCN (arXiv 2012.00720)."""
