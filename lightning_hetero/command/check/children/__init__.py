"""What the ranks of `lightning-hetero check` run; only their processes import this, and with it Lightning."""
