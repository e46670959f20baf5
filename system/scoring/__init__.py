"""How a model answers: log-likelihoods from vLLM, losses of examples, checked answers."""
