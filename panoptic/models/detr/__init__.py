"""DETR with its panoptic head (arXiv 2005.12872)."""
