"""`lightning-hetero probe`: list the devices of this machine."""
