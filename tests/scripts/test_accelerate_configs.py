"""The files for `accelerate launch --config_file`, as accelerate's own launcher reads them."""

import argparse
import json
import os
import random
import subprocess
import sys

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from scripts_loading import REPOSITORY
from torch.distributed.fsdp import OffloadPolicy, StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

FOLDER = REPOSITORY / "scripts" / "accelerate_configs"
KINDS = {
    "one_gpu": (DistributedType.NO, 1),
    "several_gpus": (DistributedType.MULTI_GPU, 2),
    "fsdp2": (DistributedType.FSDP, 2),
}


def launched(name: str, *flags: str) -> argparse.Namespace:
    """Return what `accelerate launch --config_file <name>.yaml <flags> script.py` goes by."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), *flags, "script.py"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


def environment(name: str, *flags: str) -> dict[str, str]:
    """Return the variables that the launcher adds for each process."""
    arguments = launched(name, *flags)
    if arguments.multi_gpu or arguments.use_fsdp:
        variables = prepare_multi_gpu_env(arguments)
    else:
        _, variables = prepare_simple_launcher_cmd_env(arguments)
    return {key: value for key, value in variables.items() if os.environ.get(key) != value}


def test_each_file_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_the_values_that_matter(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses keys that it does not know
    assert (config.distributed_type, config.num_processes) == KINDS[name]
    assert (config.mixed_precision, config.use_cpu, config.num_machines) == ("bf16", False, 1)
    assert config.dynamo_config == {}  # --torch_compile decides, in the script


@pytest.mark.parametrize("name", KINDS)
def test_every_nested_key_is_one_that_the_launcher_knows(name):
    """It takes over any key of a section without a word; what no flag has, nothing reads."""
    flags = vars(launch_command_parser().parse_args(["script.py"]))
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    sections = [value for value in content.values() if isinstance(value, dict)]
    assert len(sections) == (name == "fsdp2")
    assert [key for section in sections for key in section if key not in flags] == []


@pytest.mark.parametrize("name", KINDS)
def test_the_processes_are_told_the_precision_and_no_gpu_is_hidden(name):
    variables = environment(name, "--main_process_port", "0")
    assert variables["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert variables["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    assert "CUDA_VISIBLE_DEVICES" not in variables
    assert ("ACCELERATE_USE_FSDP" in variables) == (name == "fsdp2")
    assert (
        environment(name, "--mixed_precision", "no", "--main_process_port", "0")["ACCELERATE_MIXED_PRECISION"] == "no"
    )


@pytest.mark.parametrize("name", ["several_gpus", "fsdp2"])
def test_the_number_of_processes_can_be_given_on_the_command_line(name):
    for flags, expected in (((), "2"), (("--num_processes", "8"), "8")):
        arguments = launched(name, *flags, "--main_process_port", "0")
        prepare_multi_gpu_env(arguments)
        assert arguments.nproc_per_node == expected


def test_the_environment_of_fsdp2_makes_a_plugin_of_version_2(monkeypatch, caplog):
    for key, value in environment("fsdp2", "--main_process_port", "0").items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # the script fills it in
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert type(plugin.cpu_offload) is OffloadPolicy  # the one that offloads is a subclass
    assert plugin.activation_checkpointing is False
    assert [record.getMessage() for record in caplog.records] == []  # no key that version 2 has given up


@pytest.mark.slow
def test_the_launcher_trains_the_same_by_each_file(tmp_path):
    """On CPU processes: as gloo processes that share a batch, and as such that share the weights, too."""
    choose = random.Random(0)
    words = ["the", "model", "reads", "some", "words", "and", "predicts", "those", "that", "a", "mask", "hides"]
    documents = [" ".join(choose.choices(words, k=choose.randint(5, 60))) for _ in range(80)]
    (tmp_path / "corpus.txt").write_text("\n\n\n".join(documents))

    runs, logs = {}, {}
    for name, (_, processes) in KINDS.items():
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
        port = ["--cpu"] if name == "one_gpu" else ["--main_process_port", "0"]
        flags = {
            "train_file": "corpus.txt",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 100,
            "max_seq_length": 16,
            "max_steps": 4,
            "per_device_train_batch_size": 8 // processes,
            "logging_steps": 1,
            "spectral_method": "svd",
            "spectral_refresh_every": 2,
            "output_dir": name,
        }
        script = [str(REPOSITORY / "scripts" / "pretrain_mlm.py"), "--spectral_conditioning"]
        script += [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        variables = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "ACCELERATE_USE_CPU": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run([*launch, *port, *script], cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        runs[name] = json.loads((tmp_path / name / "metrics.json").read_text())
        logs[name] = done.stderr

    kinds = {name: (run["facts"]["distributed_type"], run["facts"]["processes"]) for name, run in runs.items()}
    assert kinds == {"one_gpu": ("NO", 1), "several_gpus": ("MULTI_CPU", 2), "fsdp2": ("FSDP", 2)}
    assert {run["facts"]["mixed_precision"] for run in runs.values()} == {"bf16"}
    assert ["FSDP2 shards by CrammedBertLayer" in logs[name] for name in KINDS] == [False, False, True]
    losses = {name: [record["train_loss"] for record in run["history"]] for name, run in runs.items()}
    assert len(losses["one_gpu"]) == 4
    # bf16 rounds the mean of two half batches otherwise than that of a whole one.
    assert losses["several_gpus"] == pytest.approx(losses["one_gpu"], rel=1e-4)
    assert losses["fsdp2"] == pytest.approx(losses["one_gpu"], rel=1e-4)
