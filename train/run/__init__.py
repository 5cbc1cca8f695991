"""A run's folder, log, clocks and profile."""
