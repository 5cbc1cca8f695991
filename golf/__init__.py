"""The command `golf`. It imports no torch, so that help and errors appear at once."""
