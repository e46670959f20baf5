"""Chooses categories for rows that have none."""
