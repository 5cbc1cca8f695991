"""Used everywhere in the trainer: errors, files, ranks, hardware, values, progress, wording."""
