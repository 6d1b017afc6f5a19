"""Masked language modeling: corpora, tokens, masking, presets."""
