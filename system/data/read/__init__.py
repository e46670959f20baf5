"""Files of any kind as raw rows."""
