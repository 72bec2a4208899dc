"""relearn_jax: finds out whether a language model has really forgotten."""
