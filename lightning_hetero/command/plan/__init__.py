"""`lightning-hetero plan`: predict a cluster."""
