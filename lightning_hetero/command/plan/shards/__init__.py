"""Predict a training with shards."""
