"""Implement `lightning-hetero profile`, which measures what each layer of a model takes."""
