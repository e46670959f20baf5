"""Stage ingest: chunks of files are normalised, sorted into buckets by hash, written as shards."""
