"""Loaders and samplers that all ranks divide alike."""
