"""The strategy `hetero_pipeline`."""
