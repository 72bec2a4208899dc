"""Unlearning losses: pure functions, composed as optax composes gradient transformations."""
