"""Mesh, sharding over runs, and process start-up."""
