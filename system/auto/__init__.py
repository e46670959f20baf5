"""Estimator auto: which design goes on, and when to stop."""
