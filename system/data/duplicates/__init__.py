"""Duplicates: equal rows by digest, near-duplicates by MinHash."""
