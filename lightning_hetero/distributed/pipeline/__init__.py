"""Models whose layers are split over several ranks."""
