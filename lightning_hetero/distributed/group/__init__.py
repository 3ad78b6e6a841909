"""Start and end of the process group, and its failures."""
