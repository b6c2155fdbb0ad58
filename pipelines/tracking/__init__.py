"""MLflow: runs, the writes to them, models, the registry. Nothing else of `pipelines` imports mlflow."""
