"""Dense targets, computed on the training device from the compact int map.

`pixels` holds what every pixel is told (class, centre, offset), `instances` what each segment is (mask, box).
"""
