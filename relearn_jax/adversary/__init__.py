"""An adversary without weights: what a provider's fine-tuning interface permits, behind one contract."""
