"""BERT in Flax Linen: configuration, attention, encoder, heads and losses."""
