"""Examples to try the package: quick start, tiny model, and corpora with known interactions."""
