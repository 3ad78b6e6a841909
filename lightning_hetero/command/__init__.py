"""The ``lightning-hetero`` command: what people ask without a Trainer; needs neither Lightning nor a process group."""
