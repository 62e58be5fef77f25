"""Models people use, as plain Flax NNX modules that know nothing of fine-tuning."""
