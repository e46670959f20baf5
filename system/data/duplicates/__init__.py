"""Finding duplicates: equal rows by their content hash, near-duplicates by MinHash."""
