"""From scores to effects with errors."""
