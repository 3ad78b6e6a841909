"""What the ranks that run a step tell the others about it."""
