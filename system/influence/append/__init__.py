"""Effects of new categories, added to a finished matrix."""
