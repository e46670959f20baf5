"""Connects a run with the optimiser: the problem, the choice of doses, notes on the mix."""
