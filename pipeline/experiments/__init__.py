"""The paper's experiments, and those that it lacks: grids of cells on Ray, each a file; see `jobs/experiments.py`."""
