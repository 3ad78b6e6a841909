"""Decide how much work each rank gets: pure arithmetic, without torch, I/O, clocks or environment variables."""
