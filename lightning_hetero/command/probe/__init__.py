"""Implement `lightning-hetero probe`, which lists the devices of this machine."""
