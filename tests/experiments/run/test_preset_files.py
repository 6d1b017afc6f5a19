"""A preset of one's own: a YAML file whose values flags replace, refused where it names no flag or no value of it."""

import pytest

from recipes.images.image_arguments import parse_arguments


def parse(*flags):
    return parse_arguments([*flags, "--output_dir", "no_such_folder"], "description")[0]


@pytest.fixture
def preset(tmp_path):
    def write(text):
        file = tmp_path / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        return "--preset", str(file)

    return write


def test_flags_replace_the_values_of_a_file(preset):
    named = preset("learning_rate: 2e-3\nmax_steps: 7\nmixup: 0.5\nreport_to: [tensorboard]\nrand_augment: null\n")
    arguments = parse(*named, "--max_steps", "9")
    assert (arguments.learning_rate, arguments.max_steps, arguments.mixup) == (2e-3, 9, 0.5)
    assert arguments.report_to == ["tensorboard"]
    assert arguments.rand_augment is None


def test_an_empty_mapping_is_the_defaults(preset):
    named = preset("{}")
    assert vars(parse(*named)) == vars(parse()) | {"preset": named[1]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 0.1", "The preset sets learning_rte: no such flag; --help lists them"),
        ("preset: deit-base", "The preset sets preset: no such flag"),
        ("1: 2", "The preset sets 1: no such flag"),
        ("max_steps: 1.5", "max-steps: invalid int value: '1.5'"),
        ("max_steps: many", "max-steps: invalid int value: 'many'"),
        ("max_steps: -1", "--max_steps -1 must be at least 1"),
        ("seed: {of: 1}", "The preset sets seed to a mapping; a flag has one value"),
        ("[1, 2]", "holds list and no mapping of flags to values"),
        ("", "holds NoneType and no mapping of flags to values"),
        ("a: [", "cannot be read as YAML: while parsing"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML: could not determine a constructor"),
    ],
)
def test_what_is_no_preset_is_refused(preset, capsys, text, message):
    with pytest.raises(SystemExit) as stopped:
        parse(*preset(text))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_file.yaml", "no_such_file.yaml cannot be read as YAML: [Errno 2] No such file"),
        (
            "deit",
            "--preset deit is neither one of digits, deit-base, vit-base, swin-base, xcit-medium, davit-base nor a file",
        ),
    ],
)
def test_a_preset_that_is_not_there(capsys, name, message):
    with pytest.raises(SystemExit):
        parse("--preset", name)
    assert message in capsys.readouterr().err
