"""One thin entry point for each thing a person runs."""
