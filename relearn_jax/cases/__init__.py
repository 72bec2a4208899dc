"""What is to be forgotten: corpora, relearn sets, questions and the leakage check; text only, no arrays."""
