"""EfficientPS (arXiv 2004.02307)."""
