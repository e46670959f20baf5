"""Which examples train, in which order."""
