"""Text from a trained model: `python -m train.generate`, and the samples of a run."""
