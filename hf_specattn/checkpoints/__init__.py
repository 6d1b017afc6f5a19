"""Checkpoints: converted, folded, balanced, inspected and published; what the `specattn` command does."""
