"""The influence stage on Ray: draws, trains and scores the runs, then estimates the effects."""
