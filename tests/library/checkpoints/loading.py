"""Loads checkpoints in a process of its own and writes what they compute: run as a script by the tests.

    python loading.py jobs.json

`jobs.json` has `block`, the packages that must not be imported, and `jobs`: each a `path`, the Auto class to load it
with, `trust_remote_code`, a safetensors file of `inputs` and one for the `outputs`.
"""

import importlib.abc
import json
import sys


class Blocker(importlib.abc.MetaPathFinder):
    """Makes packages unimportable, installed or not."""

    def __init__(self, names):
        self.names = tuple(names)

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)
        return None


def main(file):
    with open(file, encoding="utf-8") as stream:
        content = json.load(stream)
    sys.meta_path.insert(0, Blocker(content["block"]))
    if "hf_specattn" not in content["block"]:
        import hf_specattn  # noqa: F401
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    for job in content["jobs"]:
        auto_class = getattr(transformers, job["auto_class"])
        options = {"trust_remote_code": True} if job["trust_remote_code"] else {}
        model = auto_class.from_pretrained(job["path"], dtype="auto", **options).eval()
        with torch.no_grad():
            outputs = model(**load_file(job["inputs"]))
        tensors = {name: value.contiguous() for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        save_file(tensors, job["outputs"], metadata={"class": type(model).__name__})
    blocked = [name for name in sys.modules if name.partition(".")[0] in content["block"]]
    if blocked:
        sys.exit(f"imported although blocked: {blocked}")


if __name__ == "__main__":
    main(sys.argv[1])
