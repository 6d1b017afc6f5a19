"""What the experiments under `scripts/` share. They stand on the library, which imports nothing from here.

Scripts find this package because Python puts a script's own folder first on its path (`python scripts/x.py`,
`accelerate launch scripts/x.py`, torchrun). `python -m scripts.x` does not.
"""
