"""Used everywhere in the trainer: errors, files, ranks, values, wording."""
