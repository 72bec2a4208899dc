"""A provider's fine-tuning interface, on one machine: the wire format, jobs, and batched answers."""
