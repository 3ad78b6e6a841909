"""Orders of passes within replicas."""
