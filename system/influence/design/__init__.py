"""The design of an influence stage: runs, doses, schedules, held-out rows and their cost."""
