"""Predict a pipeline."""
