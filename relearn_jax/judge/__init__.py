"""Judges: other models that rate stored answers. Prompts, calls, ratings, agreement."""
