"""Pre-training recipes."""
