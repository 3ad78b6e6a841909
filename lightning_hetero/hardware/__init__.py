"""What each device is; may use torch, but not torch.distributed."""
