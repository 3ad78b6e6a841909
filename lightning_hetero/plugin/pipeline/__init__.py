"""`hetero_pipeline`."""
