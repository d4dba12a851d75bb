"""How and where it all runs: configuration, storage, tracking, local clusters. Imports none of the other packages."""
