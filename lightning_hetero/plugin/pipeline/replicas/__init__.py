"""Several pipelines of one run that train the same model."""
