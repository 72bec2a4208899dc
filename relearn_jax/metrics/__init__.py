"""What an answer is worth: keyword hits and log-probabilities."""
