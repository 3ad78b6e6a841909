"""Layers that live on several ranks."""
