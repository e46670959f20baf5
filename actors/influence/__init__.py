"""The influence stage on Ray: draw the runs, train and score them, estimate, go on or stop."""
