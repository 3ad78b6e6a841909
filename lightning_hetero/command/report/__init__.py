"""Implement `lightning-hetero report`, which turns a run's record into a page."""
