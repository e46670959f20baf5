"""Which runs are made: doses, schedules, held-out rows, cost."""
