"""The record of a run: its events, its file format, and what is derived from them."""
