"""Categories for rows that have none."""
