"""Estimates effects and their errors from the scores of intervention runs."""
