"""Divide the parameters of a model among ranks in shards of unequal size."""
