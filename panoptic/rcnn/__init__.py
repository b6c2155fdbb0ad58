"""Region proposals and the heads that look into them, shared by every top-down model.

A module imports only those named before it: `boxes`, `paste`, `pooling`, `regions`, `heads`.
"""
