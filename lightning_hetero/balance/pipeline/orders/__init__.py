"""Orders of passes: what each rank of a pipeline computes one after another."""
