"""What the package does per second, on whatever it runs on, and beside torch."""
