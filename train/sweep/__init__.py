"""Trains a recipe at many points of its settings, with several seeds each."""
