"""The mesh, the table of axes, and process start-up."""
