"""Text to tokens: corpus, tokenizer, shards on disk, loaders, and the published FineWeb exports."""
