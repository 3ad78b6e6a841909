"""What both strategies share."""
