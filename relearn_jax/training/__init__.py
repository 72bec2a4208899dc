"""One jitted step over the runs axis, its log, and the checkpoints of its trajectory."""
