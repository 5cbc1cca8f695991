"""From a finished run to its record: summary, submission.json, README and plots, all from the same measured numbers."""
