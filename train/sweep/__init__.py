"""Trains a recipe at many points. A point gives values to the varied settings and is trained with several seeds."""
