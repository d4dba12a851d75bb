"""The networks, in pure PyTorch: no Ray, no MLflow, no DeepSpeed and no network access."""
