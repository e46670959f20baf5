"""The trainer: a frozen plan, the loop, checkpoints, the exported model."""
