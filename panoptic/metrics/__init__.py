"""Panoptic quality, average precision, mean IoU, boundary PQ and recall; their sums, intervals and tables."""
