"""Divide the layers of a model among ranks."""
