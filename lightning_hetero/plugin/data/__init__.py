"""The loaders of `hetero_ddp`."""
