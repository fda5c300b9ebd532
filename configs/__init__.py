"""Recipes: one file a run, each with `get_config(arg)`; `--config` takes a path or a name."""
