"""How and where the system runs: configuration, storage, tracking, local clusters. Imports none of the other packages."""
