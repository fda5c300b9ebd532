"""Meshes, optimizers, the training loop, checkpoints and logs; knows pytrees and no BERT."""
