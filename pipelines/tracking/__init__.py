"""MLflow: runs, what is written to them, models, the registry. The only imports of mlflow."""
