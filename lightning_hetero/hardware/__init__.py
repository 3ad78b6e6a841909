"""Describe, measure and monitor devices; this package may use torch, but not torch.distributed."""
