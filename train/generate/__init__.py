"""Generates text with a trained model, for `python -m train.generate` and for a run's sample texts."""
