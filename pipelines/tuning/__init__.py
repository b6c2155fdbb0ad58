"""What `pipelines.tuning.sweep` is made of: expressions, checks, room for trials, one trial, its schedulers and its table."""
