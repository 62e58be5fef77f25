"""Parameter-efficient fine-tuning as pure transforms of a parameter tree."""
