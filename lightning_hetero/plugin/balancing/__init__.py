"""The callbacks that find the shares and the largest micro-batches, and their reports."""
