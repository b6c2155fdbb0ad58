"""Training targets, computed on the training device from the compact map of segments.

`dense` holds those of pixels (class, centre, offset), `instances` those of segments (box, mask).
"""
