"""Records: summary, submission.json, README and plots of finished runs; the rule check, comparison and dashboard."""
