"""Jitted batched decoding."""
