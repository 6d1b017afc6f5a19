"""The command line of the pretraining script: what flags and presets give together, and what is refused, with its reason."""

import dataclasses
import json
import socket

import pytest
from models import ARCHITECTURES

from hf_specattn import SpectralConfig, condition
from recipes.run.run_arguments import recorded_settings
from recipes.run.schedules import Budget
from recipes.text.crammed_recipe import PRESETS
from recipes.text.mlm_data import VALIDATION_SETTINGS, MlmDataSettings
from recipes.text.pretrain_arguments import (
    DEFAULT_STEPS,
    NEW_MODEL_SETTINGS,
    PretrainArguments,
    parse_arguments,
)

CRAMMED = ["--preset", "crammed-bert"]


@pytest.fixture
def parse(tmp_path):
    """A function: flags -> the arguments of the run."""

    def run(*flags):
        return parse_arguments(["--output_dir", str(tmp_path / "run"), *flags], "description")[0]

    return run


@pytest.fixture
def refused(tmp_path, capsys):
    """A function: flags -> the one line that ends the program."""

    def run(*flags):
        with pytest.raises(SystemExit) as ended:
            parse_arguments(["--output_dir", str(tmp_path / "run"), *flags], "description")
        assert ended.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


# --- presets and flags -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_parsing_asks_no_network_and_writes_nothing(parse, name, monkeypatch, tmp_path):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a look-up"))
    assert parse("--preset", name).preset == name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["before", "after"])
def test_flags_win_over_the_preset(parse, place):
    flags = ["--hidden_size", "96", "--torch_compile", "False", "--learning_rate", "2e-3", "--dataset_name", "a/b"]
    flags += ["--sequence_order", "shuffled", "--max_train_hours", "1.5", "--streaming", "false"]
    given = {
        "hidden_size": 96,
        "torch_compile": False,
        "learning_rate": 2e-3,
        "dataset_name": "a/b",
        "sequence_order": "shuffled",
        "max_train_hours": 1.5,
        "streaming": False,
    }
    arguments = parse(*flags, *CRAMMED) if place == "before" else parse(*CRAMMED, *flags)
    found = vars(arguments)
    assert given.items() <= found.items()
    rest = {name: value for name, value in PRESETS["crammed-bert"].items() if name not in given}
    assert rest.items() <= found.items()


def test_a_flag_with_the_default_value_wins_too(parse):
    default = PretrainArguments.intermediate_size
    assert PRESETS["crammed-bert"]["intermediate_size"] != default
    assert parse(*CRAMMED, "--intermediate_size", str(default)).intermediate_size == default


def test_without_a_preset_nothing_changes(parse, tmp_path):
    assert parse() == PretrainArguments(output_dir=str(tmp_path / "run"))


def test_steps_replace_the_hours_of_a_preset(parse):
    arguments = parse(*CRAMMED, "--max_steps", "50")
    assert (arguments.max_steps, arguments.max_train_hours) == (50, None)
    assert arguments.budget == Budget(steps=50)
    assert arguments.schedule_kind == "triangle"  # the preset's, over the steps


REPLACING = {
    "train_file": {
        "dataset_name": None,
        "dataset_config_name": None,
        "streaming": False,
        "max_documents": None,
        "validation_documents": None,
    },
    "validation_file": {"validation_documents": None},
    "dataset_validation_split": {"validation_documents": None},
    "validation_fraction": {"validation_documents": None},
}


@pytest.mark.parametrize("flag", REPLACING)
def test_another_corpus_replaces_that_of_a_preset(parse, flag):
    value = "0.25"
    preset, arguments = vars(parse(*CRAMMED)), vars(parse(*CRAMMED, f"--{flag}", value))
    given = {"train_file": [value], "validation_file": [value], "validation_fraction": float(value)}.get(flag, value)
    changed = {name: value for name, value in arguments.items() if preset[name] != value}
    expected = {name: value for name, value in REPLACING[flag].items() if preset[name] != value}
    assert changed == expected | {flag: given}


def test_what_replaces_leaves_what_is_given_beside_it(parse):
    flags = ["--train_file", "a.txt", "b.txt", "--max_documents", "70", "--validation_documents", "7"]
    arguments = parse(*CRAMMED, *flags)
    assert arguments.train_file == ["a.txt", "b.txt"]
    assert (arguments.max_documents, arguments.validation_documents) == (70, 7)


def test_the_spectral_flags_stand_beside_a_preset(tmp_path):
    flags = [*CRAMMED, "--output_dir", str(tmp_path / "run"), "--spectral_conditioning", "--spectral_method", "svd"]
    assert parse_arguments(flags, "description")[1].to_config() == SpectralConfig(method="svd")


# --- what follows from the arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "budget", "kind", "warmup"),
    [
        ({}, Budget(steps=DEFAULT_STEPS), "linear", DEFAULT_STEPS // 10),
        ({"max_steps": 57}, Budget(steps=57), "linear", 5),
        ({"max_steps": 57, "warmup_steps": 57}, Budget(steps=57), "linear", 57),
        ({"max_steps": 57, "warmup_steps": 0}, Budget(steps=57), "linear", 0),
        ({"max_steps": 57, "lr_scheduler_type": "triangle"}, Budget(steps=57), "triangle", 0),
        ({"max_train_hours": 0.5}, Budget(seconds=1800.0), "triangle", 0),
        ({"max_train_hours": 0.5, "lr_scheduler_type": "linear"}, Budget(seconds=1800.0), "linear", 180.0),
    ],
    ids=str,
)
def test_budget_schedule_and_warmup(values, budget, kind, warmup):
    arguments = PretrainArguments(**values)
    assert (arguments.budget, arguments.schedule_kind, arguments.warmup) == (budget, kind, warmup)


def test_a_new_model_is_as_the_flags_say_and_has_no_dropout(parse):
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 40}
    flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    config = parse(*flags, "--vocab_size", "500", "--max_seq_length", "32").new_model_config(77)
    found = config.to_dict()
    assert sizes.items() <= found.items()
    assert (config.vocab_size, config.max_position_embeddings) == (77, 32)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.0, 0.0)


def test_what_decides_the_validation_data_is_taken_from_a_record():
    names = {field.name for field in dataclasses.fields(MlmDataSettings)}
    # All but what follows from the model, and where they are kept.
    assert set(VALIDATION_SETTINGS) == names - {"tokenizer_name", "vocab_size", "sequence_order", "cache_dir"}
    settings = {"dataset_name": "owner/name", "dataset_split": "all", "max_documents": 50, "tokenizer_name": "tokens"}
    assert PretrainArguments(**settings).data_settings() == MlmDataSettings(**settings)


def test_the_tokenizer_is_that_of_the_checkpoint_unless_named():
    continued = PretrainArguments(model_name_or_path="runs/first")
    assert continued.data_settings().tokenizer_name == "runs/first"
    named = dataclasses.replace(continued, tokenizer_name="tokens")
    assert named.data_settings().tokenizer_name == "tokens"


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSALS = [
    # Numbers: the value, and what is allowed.
    ("--max_train_hours 0", "--max_train_hours 0.0 must be a finite number above 0"),
    ("--max_train_hours -1", "--max_train_hours -1.0 must be a finite number above 0"),
    ("--max_train_hours nan", "--max_train_hours nan must be a finite number above 0"),
    ("--max_train_hours inf", "--max_train_hours inf must be a finite number above 0"),
    ("--learning_rate 0", "--learning_rate 0.0 must be a finite number above 0"),
    ("--learning_rate inf", "--learning_rate inf must be a finite number above 0"),
    ("--batch_size_ramp 1.5", "--batch_size_ramp 1.5 must be at least 0 and at most 1"),
    ("--batch_size_ramp -0.1", "--batch_size_ramp -0.1 must be at least 0"),
    ("--batch_size_ramp nan", "--batch_size_ramp nan must be at least 0"),
    ("--weight_decay -1", "--weight_decay -1.0 must be at least 0"),
    ("--max_grad_norm nan", "--max_grad_norm nan must be at least 0"),
    ("--max_grad_norm -0.5", "--max_grad_norm -0.5 must be at least 0"),
    ("--mlm_probability 0", "--mlm_probability 0.0 must be above 0 and at most 1"),
    ("--mlm_probability nan", "--mlm_probability nan must be above 0"),
    ("--position_scale 0", "--position_scale 0.0 must be a finite number above 0"),
    ("--mlm_probability 0.003", "--mlm_probability 0.003 of --max_seq_length 128 predicts no token"),
    ("--validation_fraction 0", "--validation_fraction 0.0 must be between 0 and 1"),
    ("--validation_fraction nan", "--validation_fraction nan must be between 0 and 1"),
    ("--max_documents 0 --train_file a.txt", "--max_documents 0 must be at least 1"),
    ("--validation_documents 0", "--validation_documents 0 must be at least 1"),
    ("--max_tokens_per_character 0", "max_tokens_per_character is 0.0; allowed are numbers above 0"),
    ("--max_tokens_per_character nan", "max_tokens_per_character is nan; allowed are numbers above 0"),
    ("--max_tokens_per_character inf", "max_tokens_per_character is inf; allowed are numbers above 0"),
    ("--eval_steps -1", "--eval_steps -1 must be at least 0"),
    ("--logging_steps 0", "--logging_steps 0 must be at least 1"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0 must be at least 1"),
    ("--per_device_eval_batch_size 0", "--per_device_eval_batch_size 0 must be at least 1"),
    ("--num_hidden_layers 0", "--num_hidden_layers 0 must be at least 1"),
    ("--vocab_size -3", "--vocab_size -3 must be at least 1"),
    ("--seed 4294967296", "--seed 4294967296 must be at least 0 and at most 4294967295."),
    ("--max_steps 2147483649", "--max_steps 2147483649 must be at least 1 and at most 2147483648."),
    ("--hidden_size 33 --num_attention_heads 1", "--hidden_size 33 must be even"),
    ("--intermediate_size 31", "--intermediate_size 31 must be even"),
    # Choices.
    (
        "--preset big",
        "--preset big is neither one of demo, crammed-bert, crammed-bert-small nor a file that ends in .yaml",
    ),
    ("--sequence_order random", "invalid choice: 'random' (choose from"),
    ("--lr_scheduler_type cosine", "invalid choice: 'cosine' (choose from"),
    # Which corpus.
    (
        "--train_file a.txt b.txt --dataset_name owner/name",
        "--train_file a.txt b.txt and --dataset_name owner/name: give",
    ),
    ("--dataset_config_name small", "--dataset_config_name: for a dataset only; also give --dataset_name"),
    ("--dataset_revision v1 --train_file a.txt", "--dataset_revision: for a dataset only; also give --dataset_name"),
    ("--dataset_validation_split v", "--dataset_validation_split: for a dataset only; also give --dataset_name"),
    ("--dataset_split all", "--dataset_split: for a dataset only; also give --dataset_name"),
    (
        "--streaming --dataset_revision v1",
        "--dataset_revision, --streaming: for a dataset only; also give --dataset_name",
    ),
    ("--validation_file v.txt", "--validation_file without a corpus: give --train_file or --dataset_name"),
    ("--max_documents 9", "--max_documents without a corpus: give --train_file or --dataset_name"),
    # What to validate on.
    (
        "--dataset_name owner/name --validation_file v.txt --dataset_validation_split v",
        "--validation_file, --dataset_validation_split: one of them says what to validate on",
    ),
    (
        "--train_file a.txt --validation_file v.txt --validation_documents 5",
        "--validation_file, --validation_documents: one of them says what to validate on",
    ),
    (
        "--dataset_name owner/name --dataset_validation_split v --validation_documents 5",
        "--dataset_validation_split, --validation_documents: one of them says what to validate on",
    ),
    (
        "--train_file a.txt --max_documents 5 --validation_documents 5",
        "--validation_documents 5 of --max_documents 5 leaves none to train on; hold out fewer",
    ),
    (
        "--preset crammed-bert --max_documents 9",
        "--validation_documents 2000 of --max_documents 9 leaves none to train on",
    ),
    # Budget and schedule.
    ("--max_steps 10 --max_train_hours 1", "--max_steps 10 and --max_train_hours 1.0: give one of the two"),
    (
        "--warmup_steps 5 --max_train_hours 1",
        "--warmup_steps counts steps and --max_train_hours does not; leave the former",
    ),
    ("--preset crammed-bert --warmup_steps 5", "--warmup_steps counts steps and --max_train_hours does not"),
    ("--warmup_steps 5 --lr_scheduler_type triangle", "--warmup_steps: for the linear schedule only; leave it out"),
    ("--warmup_steps 301", "--warmup_steps 301 must be between 0 and --max_steps 300"),
    ("--warmup_steps -1", "--warmup_steps -1 must be between 0 and --max_steps 300"),
    # How the projections begin.
    ("--projection_init random", "invalid choice: 'random'"),
    ("--initialization_scale 0", "scale=0.0 must be a finite number above 0"),
    ("--match_norm_of identity=0", "--match_norm_of 'identity=0': give svd, or identity with its lambda"),
    ("--match_norm_of svd --initialization_scale 2", "would change the norm that --match_norm_of sets; pass only"),
    ("--match_norm_of svd --spectral_conditioning", "--match_norm_of makes the control that has the norm of W + C"),
    # Trackers.
    ("--report_to tensorboard nothing other", "--report_to nothing other: unknown or not installed; available here:"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSALS, ids=[flags for flags, _ in REFUSALS])
def test_refusals_name_the_value_and_the_way_out(refused, flags, message, tmp_path):
    assert message in refused(*flags.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--batch_size_ramp 1 --weight_decay 0 --max_grad_norm 0 --eval_steps 0 --save_steps 0 --mlm_probability 1",
        "--seed 4294967295 --warmup_steps 300",
        "--train_file a.txt --max_documents 6 --validation_documents 5",
        "--validation_documents 5",
        "--dataset_name owner/name --validation_file v.txt --streaming --dataset_split all",
        "--max_train_hours 0.01 --lr_scheduler_type linear",
        "--mlm_probability 0.004",
        "--report_to all",
    ],
)
def test_the_edges_of_what_is_allowed(parse, flags):
    parse(*flags.split())


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Folders of a tiny Crammed BERT of 24 positions, stock and conditioned."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = ARCHITECTURES["crammed_bert"].model("AutoModelForMaskedLM")
    model.save_pretrained(folder / "stock")
    condition(model, SpectralConfig(lambda_=1.0))
    model.save_pretrained(folder / "identity")
    return folder


def test_a_checkpoint_is_accepted_with_what_fits_it(parse, checkpoints):
    length = ["--max_seq_length", "24"]
    assert parse("--model_name_or_path", str(checkpoints / "stock"), *length).max_seq_length == 24
    same = ["--spectral_conditioning", "--lambda_", "1.0"]
    for name in ("stock", "identity"):
        parse("--model_name_or_path", str(checkpoints / name), *same, *length)


@pytest.mark.parametrize("name", [*NEW_MODEL_SETTINGS, "projection_init", "initialization_scale"])
def test_a_checkpoint_excludes_what_shapes_a_new_model(refused, checkpoints, name):
    default = str(getattr(PretrainArguments, name))  # it counts that the flag is there, not what it says
    message = refused(
        "--model_name_or_path", str(checkpoints / "stock"), "--max_seq_length", "24", f"--{name}", default
    )
    assert f"--{name}: for a new model only; leave out together with --model_name_or_path" in message


def test_all_that_shapes_a_new_model_is_listed(refused, checkpoints):
    flags = ["--vocab_size", "50", "--hidden_size", "8", "--max_seq_length", "24"]
    message = refused("--model_name_or_path", str(checkpoints / "stock"), *flags)
    assert "--hidden_size, --vocab_size: for a new model only" in message


def test_a_preset_shapes_no_checkpoint(parse, checkpoints):
    arguments = parse(*CRAMMED, "--model_name_or_path", str(checkpoints / "stock"), "--max_seq_length", "24")
    assert arguments.learning_rate == PRESETS["crammed-bert"]["learning_rate"]


def test_a_checkpoint_that_does_not_fit_is_refused(refused, checkpoints):
    stock, identity = (["--model_name_or_path", str(checkpoints / name)] for name in ("stock", "identity"))
    assert f"--max_seq_length 25 exceeds the 24 positions of {checkpoints / 'stock'}" in refused(
        *stock, "--max_seq_length", "25"
    )
    length = ["--max_seq_length", "24"]
    assert "lambda_" in refused(*identity, *length, "--spectral_conditioning", "--lambda_", "2.0")
    assert "leave out --spectral_conditioning" in refused(*stock, *length, "--eval_only", "--spectral_conditioning")


# --- measuring a saved model -----------------------------------------------------------------------------------------


@pytest.fixture
def measure(parse, refused, checkpoints, tmp_path):
    """A function: the recorded arguments of a run, and flags -> the arguments of measuring its model."""
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text((checkpoints / "stock" / "config.json").read_text())

    def run(recorded, *flags, ends=False):
        arguments = vars(PretrainArguments(max_seq_length=24, **recorded))
        (folder / "metrics.json").write_text(json.dumps({"arguments": arguments}))
        return (refused if ends else parse)("--eval_only", "--model_name_or_path", str(folder), *flags)

    return run


def data_of(arguments):
    """The data settings that are not the default, beside the length."""
    defaults = vars(PretrainArguments())
    return {
        name: getattr(arguments, name)
        for name in (*VALIDATION_SETTINGS, "mlm_probability")
        if getattr(arguments, name) != defaults[name]
    }


RECORDED_FILES = {"train_file": ["a.txt", "b.txt"], "validation_file": ["v.txt"], "text_column": "body"}
RECORDED_DATASET = {
    "dataset_name": "owner/name",
    "dataset_config_name": "small",
    "dataset_split": "all",
    "streaming": True,
    "max_documents": 100,
    "validation_documents": 10,
    "normalize_text": True,
}


@pytest.mark.parametrize("recorded", [RECORDED_FILES, RECORDED_DATASET, {}], ids=["files", "dataset", "embedded"])
def test_a_model_is_measured_on_the_data_of_its_run(measure, recorded):
    assert data_of(measure(recorded)) == recorded | {"max_seq_length": 24}


def test_only_the_data_of_the_run_are_taken_over(measure):
    arguments = measure(RECORDED_FILES | {"seed": 7, "per_device_eval_batch_size": 3, "learning_rate": 0.5})
    assert (arguments.seed, arguments.learning_rate) == (0, PretrainArguments.learning_rate)
    assert arguments.per_device_eval_batch_size == PretrainArguments.per_device_eval_batch_size


def test_the_data_of_the_run_win_over_a_preset_and_flags_over_both(measure):
    arguments = measure(RECORDED_FILES, *CRAMMED, "--text_column", "other")
    assert arguments.dataset_name is None
    assert (arguments.train_file, arguments.text_column) == (RECORDED_FILES["train_file"], "other")
    assert arguments.validation_documents is None


@pytest.mark.parametrize(
    ("recorded", "flag", "gone"),
    [
        (RECORDED_FILES, "--validation_documents 4", ["validation_file"]),
        (RECORDED_FILES, "--validation_fraction 0.5", ["validation_file"]),
        (RECORDED_FILES, "--dataset_name other/name", ["train_file"]),
        (RECORDED_DATASET, "--validation_file w.txt", ["validation_documents"]),
        (RECORDED_DATASET, "--dataset_validation_split test", ["validation_documents"]),
        (
            RECORDED_DATASET,
            "--train_file c.txt",
            ["dataset_name", "dataset_config_name", "dataset_split", "streaming"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_data_replace_the_recorded_ones(measure, recorded, flag, gone):
    name, value = flag.removeprefix("--").split()
    found = data_of(measure(recorded, *flag.split()))
    given = found.pop(name)
    assert given in (value, [value], float(value) if value[0].isdigit() else None)
    kept = {key: recorded[key] for key in recorded if key not in gone and key != name}
    assert found == kept | {"max_seq_length": 24}


def test_two_kinds_of_validation_data_are_refused_all_the_same(measure):
    flags = ["--validation_file", "w.txt", "--validation_documents", "3"]
    assert "one of them says what to validate on" in measure(RECORDED_DATASET, *flags, ends=True)


def test_a_model_of_another_program_has_no_recorded_data(parse, checkpoints):
    assert recorded_settings(str(checkpoints / "stock"), VALIDATION_SETTINGS) == {}
    flags = ["--eval_only", "--model_name_or_path", str(checkpoints / "stock"), "--max_seq_length", "16"]
    assert data_of(parse(*flags, "--train_file", "a.txt")) == {"train_file": ["a.txt"], "max_seq_length": 16}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"facts": {}}', '{"arguments": 3}'])
def test_a_broken_record_is_named(refused, tmp_path, content):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "metrics.json").write_text(content)
    message = refused("--eval_only", "--model_name_or_path", str(tmp_path / "saved"))
    assert f"{tmp_path / 'saved' / 'metrics.json'} is not the record of a run" in message
    assert "Mend or remove it" in message


def test_measuring_looks_at_no_output_folder(measure, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    measure(RECORDED_FILES)


# --- the output folder -----------------------------------------------------------------------------------------------


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def test_an_empty_folder_is_accepted(parse, output):
    parse()
    parse("--resume_from_checkpoint")


def test_a_file_is_no_folder(refused, tmp_path):
    (tmp_path / "run").write_text("")
    for flags in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint"]):
        assert f"--output_dir {tmp_path / 'run'} cannot be written: {tmp_path / 'run'} is a file" in refused(*flags)


def test_a_folder_with_files_needs_a_word(refused, parse, output):
    (output / "notes.txt").write_text("mine")
    message = refused()
    assert f"--output_dir {output} is not empty" in message
    assert "--resume_from_checkpoint" in message
    assert "--overwrite_output_dir" in message
    parse("--overwrite_output_dir")
    parse("--resume_from_checkpoint")  # a run that was killed before its first checkpoint
    parse("--show_plan")  # writes nothing


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_finished_run_without_checkpoints_is_not_resumed(refused, parse, output, name):
    (output / name).write_text("{}")
    message = refused("--resume_from_checkpoint")
    assert f"{output} holds a saved model and no checkpoint to continue from" in message
    assert "--overwrite_output_dir" in message
    (output / "checkpoint-000003").mkdir()
    parse("--resume_from_checkpoint")
    assert "is not empty" in refused()
