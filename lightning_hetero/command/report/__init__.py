"""`lightning-hetero report`: turn a run's record into a page."""
