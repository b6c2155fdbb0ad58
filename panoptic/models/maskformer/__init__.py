"""MaskFormer (arXiv 2107.06278)."""
