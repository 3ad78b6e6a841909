"""Learn the step time of each rank, and decide when other shares pay off."""
