"""The glue to Lightning: thin, without arithmetic."""
