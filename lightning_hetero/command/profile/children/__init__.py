"""What `lightning-hetero profile` runs; it is started by name, because it needs Lightning."""
