"""What was measured: rows, tables, plots, comparisons, and the code they belong to."""
