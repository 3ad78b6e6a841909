"""Predict and plan again replicas whose devices change: their shares of the batch, and the layers of their ranks."""
