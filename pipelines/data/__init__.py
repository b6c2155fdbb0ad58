"""Data sets in, micro-batches out."""
