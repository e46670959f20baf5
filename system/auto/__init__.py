"""Estimator `auto`: chooses a design and decides when to stop measuring."""
