"""Which pass each rank is in, and the order in which all ranks gather and reduce units in it."""
