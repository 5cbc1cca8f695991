"""Code that all of the trainer uses: errors, files, ranks, hardware, values, progress, wording."""
