"""Lists, shows, compares and deletes runs."""
