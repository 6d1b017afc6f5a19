"""What the experiments under `scripts/` share. They use the library, which imports nothing from here.

Scripts find this package because Python puts a script's own folder first on its path (`python scripts/demo.py`,
`accelerate launch scripts/demo.py`, torchrun). `python -m scripts.demo` does not.
"""
