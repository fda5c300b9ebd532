"""Text to batches: sources, tokenizers, examples, prepared rows, masking and order."""
