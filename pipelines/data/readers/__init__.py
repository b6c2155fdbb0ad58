"""Readers of annotated data sets, a file a format."""
