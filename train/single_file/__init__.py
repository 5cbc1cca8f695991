"""Packs the modules that a run needs into one script, which a record contains, and counts the bytes of this script."""
