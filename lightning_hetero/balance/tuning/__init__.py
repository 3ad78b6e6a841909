"""Learn how long ranks take, and decide when other shares pay off."""
