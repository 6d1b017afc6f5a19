"""Loading checkpoints in a process without the package, or with it (see `loading.py`)."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SCRIPT = Path(__file__).with_name("loading.py")
REPOSITORY = SCRIPT.parents[3]


@dataclass
class Loaded:
    """What a process found: the outputs, and the name of the model's class."""

    outputs: dict[str, Tensor]
    model_class: str


class SeparateProcess:
    """Checkpoints to load in one process, which is started once.

    Args:
        folder: for the files that go there and back.
        package: whether hf_specattn can be imported there.
    """

    def __init__(self, folder: Path, package: bool):
        self.folder = folder
        self.package = package
        self.jobs: dict[str, dict[str, object]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(
        self, name: str, path: Path, inputs: dict[str, Tensor], auto_class: str = "AutoModel", trust: bool = False
    ) -> None:
        save_file({key: value.contiguous() for key, value in inputs.items()}, self.folder / f"{name}.in")
        self.jobs[name] = {
            "path": str(path),
            "auto_class": auto_class,
            "trust_remote_code": trust,
            "inputs": str(self.folder / f"{name}.in"),
            "outputs": str(self.folder / f"{name}.out"),
        }

    def run(self) -> dict[str, Loaded]:
        file = self.folder / "jobs.json"
        file.write_text(
            json.dumps({"block": [] if self.package else ["hf_specattn"], "jobs": list(self.jobs.values())})
        )
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {
            "HF_MODULES_CACHE": str(self.folder / "modules"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        paths = [REPOSITORY] if self.package else []
        if overlay := [
            path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path.endswith(".overlay")
        ]:
            paths += overlay
        if paths:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
        # In an empty folder: Python would else find the package beside it.
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(file)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        loaded = {}
        for name, job in self.jobs.items():
            with safe_open(str(job["outputs"]), framework="pt") as stream:
                model_class = stream.metadata()["class"]
            loaded[name] = Loaded(load_file(str(job["outputs"])), model_class)
        return loaded
