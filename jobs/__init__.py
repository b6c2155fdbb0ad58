"""The commands: each parses its options, calls one function of `pipelines` and prints the result."""
