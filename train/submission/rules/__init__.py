"""The rules of Parameter Golf, one module per subject. `train.submission.check` applies the rules."""
