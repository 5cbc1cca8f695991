"""The results: rows, tables, plots, and the version of the measured code."""
