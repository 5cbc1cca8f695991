"""Stored results: their rows, tables and plots, and the version of the measured code."""
