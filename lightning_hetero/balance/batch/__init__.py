"""Divide a global batch among ranks."""
