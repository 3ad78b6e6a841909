"""Several pipelines that train copies of one model, each with its part of the batch."""
