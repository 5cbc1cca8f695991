"""A trained model for other programs: `python -m train.export`."""
