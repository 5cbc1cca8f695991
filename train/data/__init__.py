"""Turns text into token shards, downloads the published FineWeb shards, and loads batches from shards."""
