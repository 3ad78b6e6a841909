"""Parts of a user's step: batches, outputs, logs, metrics, gradients."""
