"""Implement `lightning-hetero check`, which tries on this machine's devices what a training relies on."""
