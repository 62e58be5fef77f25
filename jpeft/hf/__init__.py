"""Hugging Face files: checkpoints and adapters."""
