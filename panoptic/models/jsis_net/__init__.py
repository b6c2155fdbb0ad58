"""JSIS-Net (arXiv 1809.02110)."""
