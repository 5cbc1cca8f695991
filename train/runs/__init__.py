"""`python -m train.runs` lists, shows, compares and deletes runs."""
