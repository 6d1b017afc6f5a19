"""The templates of the model cards, shipped with the library as `hf_specattn.model_cards`."""
