"""What a job would need of memory and time, by arithmetic alone, before any device is touched."""
