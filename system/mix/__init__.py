"""What a run knows that the optimiser does not: its question, its doses, its notes."""
