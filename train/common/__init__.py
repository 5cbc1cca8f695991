"""What every part of the trainer uses: errors, files, ranks, values, words."""
