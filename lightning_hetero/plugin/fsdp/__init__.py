"""The strategy ``hetero_fsdp``: parameters in shards by memory, samples by speed."""
