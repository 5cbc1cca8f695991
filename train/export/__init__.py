"""`python -m train.export` writes a trained model in formats that other programs read."""
