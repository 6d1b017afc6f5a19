"""SIGKILL during a conversion, at five moments: the destination is the old folder or the new one, never a part of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES

SCRIPT = Path(__file__).with_name("killing.py")
MOMENTS = ("conditioning", "second-shard", "card", "before-the-exchange", "within-the-exchange")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    ARCHITECTURES["bert"].model("AutoModel", torch.float32).save_pretrained(folder / "source", max_shard_size="30KB")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[3])}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "source"), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("moment", MOMENTS)
def test_nothing_is_half_written(moment, seen):
    found = seen[moment]
    assert found["killed"]
    exchanging = moment == "within-the-exchange"
    assert found["after_kill"] == ({} if exchanging else {"old.txt": 3})
    leftovers = {"conditioning": 0, "within-the-exchange": 2}.get(moment, 1)
    assert sum(name.startswith(".destination.tmp-") for name in found["beside"]) == leftovers
    # whatever comes next finds the old folder, and does not take it for an empty one
    assert found["restored"] == {"old.txt": 3}
    assert found["refused"]
    # and the command run again ends as if nothing had happened
    assert sorted(found["done"]) == found["files"]
    assert "model.safetensors.index.json" in found["files"]
    assert found["left"] == ["destination"]
