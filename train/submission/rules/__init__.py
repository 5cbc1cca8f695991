"""The rules of Parameter Golf, a module per subject; `train.submission.check` applies them."""
