"""`hetero_ddp`."""
