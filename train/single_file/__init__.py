"""Packs the modules that a run needs into the single script that a record ships, and counts its bytes."""
