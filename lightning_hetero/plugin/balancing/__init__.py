"""The callbacks that find the shares, and how they report."""
