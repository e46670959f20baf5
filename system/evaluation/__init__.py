"""What the trained models are worth, against honest baselines."""
