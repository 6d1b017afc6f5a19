"""The presets are values that the flags accept, and every departure from the published recipe is listed, no other."""

import dataclasses

import pytest

from hf_specattn.crammed_bert import CrammedBertConfig
from recipes.text.cleaning import PUBLISHED_CLEANING
from recipes.text.crammed_recipe import (
    NOT_DEVIATING,
    PRESETS,
    PUBLISHED_BATCH_SIZE,
    PUBLISHED_RECIPE,
    deviations,
)
from recipes.text.pretrain_arguments import PretrainArguments, parse_arguments

CRAMMED_BERT = PRESETS["crammed-bert"]

FIELDS = {field.name: field for field in dataclasses.fields(PretrainArguments)}

each_preset = pytest.mark.parametrize("name", PRESETS)


def parse(*flags):
    return parse_arguments([*flags, "--output_dir", "no_such_folder"], "description")[0]


def published_settings(**changes):
    """What a run of the published recipe has, by the names of the flags: that of the preset, but for its precision."""
    return vars(parse("--preset", "crammed-bert", "--mixed_precision", "fp16")) | changes


def as_flags(values):
    """The same values on a command line; `None` is left to the default."""
    flags = []
    for name, value in values.items():
        flags += [] if value is None else [f"--{name}", str(value)]
    return flags


# --- presets ---------------------------------------------------------------------------------------------------------


@each_preset
def test_every_key_is_a_flag(name):
    assert PRESETS[name].keys() <= FIELDS.keys()
    assert not PRESETS[name].keys() & {"preset", "output_dir", "seed", "model_name_or_path", "train_file"}


@each_preset
def test_a_preset_sets_its_values_and_leaves_the_others(name):
    arguments = parse("--preset", name)
    defaults = {field: FIELDS[field].default for field in FIELDS}
    assert vars(arguments) == defaults | PRESETS[name] | {"preset": name, "output_dir": "no_such_folder"}


@each_preset
def test_the_values_are_such_as_the_command_line_accepts(name):
    """As flags they pass through types and choices, which defaults do not."""
    values = PRESETS[name]
    parsed = vars(parse(*as_flags(values)))
    assert {field: parsed[field] for field in values} == values
    assert [type(parsed[field]) for field in values] == [type(value) for value in values.values()]
    assert all(FIELDS[field].default is None for field, value in values.items() if value is None)


def test_the_demonstration_is_what_runs_without_flags():
    assert PRESETS["demo"] == {}
    assert dataclasses.replace(parse("--preset", "demo"), preset=None) == parse()


def test_the_model_is_the_published_one():
    """The sizes of the configuration class are those published in 2022, of which the number of layers has grown since."""
    config = parse("--preset", "crammed-bert").new_model_config(PUBLISHED_RECIPE["vocab_size"])
    published = CrammedBertConfig(num_hidden_layers=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert config.to_dict() == published.to_dict()


def test_the_cleaning_is_the_published_one():
    values = PUBLISHED_RECIPE
    assert (values["normalize_text"], values["max_tokens_per_character"]) == (
        PUBLISHED_CLEANING.normalize,
        PUBLISHED_CLEANING.max_tokens_per_character,
    )


def test_the_preset_is_the_recipe_but_for_its_precision():
    settings = vars(parse("--preset", "crammed-bert"))
    assert deviations(settings, PUBLISHED_BATCH_SIZE) == ["mixed_precision: bf16 (published: fp16)"]
    assert PUBLISHED_RECIPE.items() <= (CRAMMED_BERT | {"mixed_precision": "fp16"}).items()
    assert PUBLISHED_BATCH_SIZE == 8192  # sequences, of which the published configuration has so many


def test_the_small_preset_is_smaller_in_every_way():
    small = PRESETS["crammed-bert-small"]
    assert small.keys() == CRAMMED_BERT.keys()
    changed = {name for name in small if small[name] != CRAMMED_BERT[name]}
    assert all(small[name] < CRAMMED_BERT[name] for name in changed)
    # What its comment says.
    assert small["max_documents"] * 16 == CRAMMED_BERT["max_documents"]
    assert small["per_device_train_batch_size"] * small["gradient_accumulation_steps"] * 4 == PUBLISHED_BATCH_SIZE


# --- deviations ------------------------------------------------------------------------------------------------------


def test_the_published_recipe_does_not_deviate():
    assert deviations(published_settings(), PUBLISHED_BATCH_SIZE) == []


@pytest.mark.parametrize("name", sorted(PUBLISHED_RECIPE.keys() - NOT_DEVIATING))
def test_each_other_value_is_one_line(name):
    value = PUBLISHED_RECIPE[name]
    other = "another"
    if isinstance(value, (bool, int, float)):
        other = not value if isinstance(value, bool) else 2 * value
    lines = deviations(published_settings(**{name: other}), PUBLISHED_BATCH_SIZE)
    assert lines == [f"{name}: {other} (published: {value})"]


def test_lines_come_in_the_order_of_the_recipe():
    settings = published_settings(weight_decay=0.1, hidden_size=64, max_documents=None)
    assert deviations(settings, PUBLISHED_BATCH_SIZE) == [
        "max_documents: None (published: 8000000)",
        "hidden_size: 64 (published: 768)",
        "weight_decay: 0.1 (published: 0.01)",
    ]


def test_how_the_batch_is_cut_and_the_work_is_done_is_no_deviation():
    settings = published_settings(
        per_device_train_batch_size=64, gradient_accumulation_steps=4, streaming=False, torch_compile=False
    )
    assert PUBLISHED_RECIPE.keys() >= NOT_DEVIATING
    assert deviations(settings, PUBLISHED_BATCH_SIZE) == []


def test_what_the_recipe_says_nothing_about_is_no_deviation():
    others = FIELDS.keys() - PUBLISHED_RECIPE.keys() - {"model_name_or_path", "tokenizer_name"}
    assert {"seed", "output_dir", "logging_steps", "validation_documents"} <= others
    assert deviations(published_settings(**dict.fromkeys(others, "another")), PUBLISHED_BATCH_SIZE) == []


def test_another_global_batch_is_a_deviation_whatever_it_is_cut_into():
    (line,) = deviations(published_settings(), PUBLISHED_BATCH_SIZE // 2)
    assert line.startswith("global batch size: 4096 sequences (published: 8192;")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "number of processes"):
        assert name in line


def test_another_model_or_tokenizer_is_a_deviation():
    settings = published_settings(model_name_or_path="runs/first", tokenizer_name="bert-base-uncased")
    assert deviations(settings, PUBLISHED_BATCH_SIZE) == [
        "model: continued from runs/first (published: from random weights)",
        "tokenizer: bert-base-uncased (published: trained on the corpus)",
    ]


def test_the_small_preset_deviates_in_what_it_changes():
    arguments = parse("--preset", "crammed-bert-small")
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    names = [line.partition(":")[0] for line in deviations(vars(arguments), batch)]
    small = PRESETS["crammed-bert-small"]
    changed = [name for name in PUBLISHED_RECIPE if small[name] != PUBLISHED_RECIPE[name]]
    assert names == [*(name for name in changed if name not in NOT_DEVIATING), "global batch size"]
