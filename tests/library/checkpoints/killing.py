"""Converts a checkpoint again and again, each time in a forked process that is killed at another moment (SIGKILL).

    python killing.py SRC FOLDER

For each of MOMENTS, FOLDER/<moment>/destination holds `old.txt` already. What lies there after the kill, and what after the
conversion is done again, are printed as JSON. Run as a script by the tests.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from hf_specattn import SpectralConfig
from hf_specattn.checkpoints import conversion, destinations

OPTIONS = conversion.Options(overwrite=True)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module, name, number=1):
    """Die when `module.name` is called for the n-th time."""
    original, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        return die() if len(calls) == number else original(*args, **kwargs)

    setattr(module, name, counted)


MOMENTS = {
    "conditioning": lambda: at_call(conversion, "condition"),
    "second-shard": lambda: at_call(destinations, "save_file", 2),
    "card": lambda: at_call(conversion, "write_card"),
    "before-the-exchange": lambda: at_call(destinations, "replace_folder"),
    "within-the-exchange": lambda: at_call(os, "rename", 2),
}


def convert(source, destination):
    return conversion.convert(source, destination, SpectralConfig("svd"), options=OPTIONS)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def main(source, folder):
    torch.set_num_threads(1)
    seen = {}
    for moment, arm in MOMENTS.items():
        parent = Path(folder) / moment
        destination = parent / "destination"
        destination.mkdir(parents=True)
        (destination / "old.txt").write_text("old")
        child = os.fork()
        if child == 0:
            arm()
            convert(source, destination)
            os._exit(0)  # the moment never came
        status = os.waitpid(child, 0)[1]
        after_kill, beside = contents(destination), sorted(path.name for path in parent.iterdir())
        # As any command does first, with or without --overwrite.
        try:
            destinations.check_destination(destination, None, overwrite=False)
            refused = False
        except destinations.DestinationError:
            refused = True
        restored = contents(destination)
        written = convert(source, destination).files
        seen[moment] = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "after_kill": after_kill,
            "beside": beside,
            "refused": refused,
            "restored": restored,
            "files": sorted(written),
            "done": contents(destination),
            "left": sorted(path.name for path in parent.iterdir()),
        }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
