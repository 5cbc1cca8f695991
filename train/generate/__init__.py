"""Generates text with a trained model: `python -m train.generate`, and the sample texts of a run."""
