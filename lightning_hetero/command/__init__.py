"""The ``lightning-hetero`` command, which needs no Trainer: neither Lightning nor a process group."""
