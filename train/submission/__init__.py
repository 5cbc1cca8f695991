"""Makes, checks and compares records, and draws a dashboard of runs.

A record is the folder that a submission adds to Parameter Golf's repository: README.md, submission.json, logs, script.
"""
