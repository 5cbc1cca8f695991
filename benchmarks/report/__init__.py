"""What was measured: rows, tables, plots, and the code they belong to."""
