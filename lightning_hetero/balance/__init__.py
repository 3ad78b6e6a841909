"""How much work each rank gets: pure arithmetic without torch, input or output, clock or environment."""
