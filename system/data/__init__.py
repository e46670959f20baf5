"""The corpus: raw files in, Arrow shards by category out, every row accounted for."""
