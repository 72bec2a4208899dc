"""Text to token batches: JSON lines, tokenizing, padding to length buckets."""
