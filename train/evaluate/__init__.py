"""Scores a model on the validation text, in bits per byte, and stores the scores."""
