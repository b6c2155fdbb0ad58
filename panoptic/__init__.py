"""Panoptic segmentation in plain PyTorch: data structures, models, training, evaluation and metrics."""
