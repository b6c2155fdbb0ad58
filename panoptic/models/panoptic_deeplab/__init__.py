"""Panoptic-DeepLab (arXiv 1911.10194)."""
