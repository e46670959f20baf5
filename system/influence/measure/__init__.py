"""Trains and scores the intervention runs: ledger, proxy model, gradients."""
