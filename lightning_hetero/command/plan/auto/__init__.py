"""Predict every strategy for the same model, and say which one to take."""
