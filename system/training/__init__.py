"""Training of one model: plan, training loop, checkpoints, and export."""
