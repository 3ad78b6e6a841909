"""Loaders and samplers that all ranks divide in the same way."""
