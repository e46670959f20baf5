"""Scores models: log-likelihoods from vLLM, losses of examples, checks of answers."""
