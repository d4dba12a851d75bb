"""Audio in; shards, batches and voices out: everything that runs on Ray."""
