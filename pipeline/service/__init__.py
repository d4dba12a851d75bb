"""Speech and voices over HTTP: an ingress in FastAPI, an engine that holds the model, both deployments of Ray Serve."""
