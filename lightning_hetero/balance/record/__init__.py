"""The record of a run: its events, its file format, and the figures derived from them."""
