"""Panoptic FPN (arXiv 1901.02446)."""
