"""Implement `lightning-hetero plan`, which predicts a cluster."""
