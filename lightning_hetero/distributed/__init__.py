"""The glue to torch.distributed and torch's data loading; knows nothing of Lightning."""
