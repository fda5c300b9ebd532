"""The parts of a fine-tuning run that `bertjax finetune` and `bertjax evaluate` put together."""
