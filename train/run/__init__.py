"""The run folder, the log, the clocks and the profile of a run."""
