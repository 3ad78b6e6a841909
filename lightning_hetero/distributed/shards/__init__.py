"""Parameters in shards of unequal size, gathered while they are used."""
