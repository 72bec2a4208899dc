"""Flax Linen decoders and their Hugging Face checkpoints, in and out."""
