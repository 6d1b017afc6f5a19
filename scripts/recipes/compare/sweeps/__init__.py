"""Grids of training runs: their design, the paper's tables as designs, running them, and what came out."""
