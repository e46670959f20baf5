"""What the package brings along to try it: quick start, tiny model, planted worlds."""
