"""Two-stage detection for the top-down models: boxes, region proposals, heads on pooled regions, pasted masks."""
