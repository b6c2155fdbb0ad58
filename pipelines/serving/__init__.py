"""A trained model behind HTTP, on Ray Serve: `jobs/serve.py`. Needs the extra `serve`."""
