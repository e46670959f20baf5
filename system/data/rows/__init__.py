"""One raw row as a normal one: its shape, its conversation, its category, its answer."""
