"""Stage `select`: which rows are trained on, and in which order."""
