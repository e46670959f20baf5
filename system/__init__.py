"""What instructmix computes: pure functions and records, no Ray."""
