"""Code that all parts of the trainer use: errors, files, ranks, hardware, values, progress, wording."""
