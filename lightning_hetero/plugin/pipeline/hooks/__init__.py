"""The hooks of modules and callbacks under `hetero_pipeline`."""
