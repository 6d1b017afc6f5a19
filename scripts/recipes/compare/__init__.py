"""Finished runs side by side, and sweeps of them."""
