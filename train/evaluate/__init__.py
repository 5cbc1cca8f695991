"""Scoring: windows over the validation text, bits per byte, and the file that keeps the scores."""
