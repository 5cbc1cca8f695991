"""Text to tokens: documents, tokenizer, shards, loaders, and downloads of the published FineWeb shards."""
