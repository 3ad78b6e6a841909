"""The strategy `hetero_ddp`."""
