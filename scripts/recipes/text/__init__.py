"""Masked language modelling: corpora, tokens, masking, presets."""
