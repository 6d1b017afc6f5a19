import pytest
from transformers import HfArgumentParser

from hf_specattn import SpectralConfig
from recipes.run.spectral_arguments import SpectralArguments, explicitly_given, parse_lambda


def parse(*flags: str) -> SpectralArguments:
    (arguments,) = HfArgumentParser(SpectralArguments).parse_args_into_dataclasses(args=list(flags))
    return arguments


def test_without_the_flag_nothing_is_conditioned():
    assert parse().to_config() is None
    assert parse().to_loading_kwargs() == {}


def test_the_flag_alone_is_the_papers_default():
    arguments = parse("--spectral_conditioning")
    assert arguments.to_config() == SpectralConfig(method="identity", lambda_=10.0)
    assert arguments.init == "additive"
    assert arguments.to_loading_kwargs() == {"spectral_conditioning": True}


def test_every_flag_arrives():
    arguments = parse(
        "--spectral_conditioning",
        "--lambda_",
        "query=10,key=0.5",
        "--spectral_method",
        "identity",
        "--spectral_targets",
        "query",
        "key",
        "--spectral_granularity",
        "head",
        "--spectral_init",
        "preserve",
    )
    config = SpectralConfig("identity", {"query": 10.0, "key": 0.5}, ("query", "key"), "head")
    assert arguments.to_config() == config
    assert arguments.init == "preserve"
    assert arguments.to_loading_kwargs() == {
        "spectral_conditioning": True,
        "lambda_": {"query": 10.0, "key": 0.5},
        "spectral_method": "identity",
        "spectral_targets": ["query", "key"],
        "spectral_granularity": "head",
        "spectral_init": "preserve",
    }
    dynamic = parse("--spectral_conditioning", "--spectral_method", "svd", "--spectral_refresh_every", "5")
    assert dynamic.to_config() == SpectralConfig("svd", refresh_every=5)


DYNAMIC = ("--spectral_conditioning", "--spectral_method", "svd", "--spectral_refresh_every", "5")


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        ((), None),
        (("--spectral_exact_refresh", "True"), True),
        (("--spectral_exact_refresh", "False"), False),
    ],
)
def test_how_corrections_are_refreshed_is_no_setting_of_the_model(flags, exact):
    arguments = parse(*DYNAMIC, *flags)
    assert arguments.spectral_exact_refresh is exact
    assert arguments.to_config() == SpectralConfig("svd", refresh_every=5)
    assert arguments.to_loading_kwargs() == parse(*DYNAMIC).to_loading_kwargs()


@pytest.mark.parametrize("value", ["True", "False"])
@pytest.mark.parametrize("flags", [(), ("--spectral_method", "svd")])
def test_how_to_refresh_what_is_never_refreshed_is_refused(flags, value):
    with pytest.raises(ValueError, match=f"--spectral_exact_refresh {value}.*--spectral_refresh_every"):
        parse("--spectral_conditioning", *flags, "--spectral_exact_refresh", value)


@pytest.mark.parametrize(
    "flags",
    [
        ("--lambda_", "1.0"),
        ("--spectral_method", "svd"),
        ("--spectral_targets", "key"),
        ("--spectral_init", "additive"),
        ("--spectral_exact_refresh", "False"),
    ],
)
def test_a_spectral_flag_without_the_main_one_is_an_error(flags):
    with pytest.raises(ValueError, match=f"{flags[0]} given without --spectral_conditioning"):
        parse(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lambda_", "0"), "lambda_"),
        (("--lambda_", "nan"), "lambda_"),
        (("--lambda_", "strong"), "'strong' is neither a number"),
        (("--lambda_", "query=1"), "must equal the targets"),
        (("--spectral_method", "svd", "--lambda_", "2"), "means nothing to method='svd'"),
        (("--spectral_refresh_every", "3"), "refresh_every=3 means nothing"),
        (
            ("--spectral_method", "svd", "--spectral_refresh_every", "3", "--spectral_init", "preserve"),
            "excludes --spectral_refresh_every 3",
        ),
    ],
)
def test_bad_values_are_refused_at_once(flags, message):
    with pytest.raises(ValueError, match=message):
        parse("--spectral_conditioning", *flags)


def test_unknown_names_are_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit):
        parse("--spectral_conditioning", "--spectral_method", "qr")
    assert "identity" in capsys.readouterr().err


def test_lambda_forms():
    assert parse_lambda(None) is None
    assert parse_lambda("2.5") == 2.5
    assert parse_lambda("query = 1, value=2e-1") == {"query": 1.0, "value": 0.2}
    for text in ("", "query=", "=1", "query=1,query=2", "query=1,", "1,2", "query:1"):
        with pytest.raises(ValueError, match="neither a number"):
            parse_lambda(text)


def test_explicitly_given_sees_default_values_too():
    parser = HfArgumentParser(SpectralArguments)
    names = ["lambda_", "spectral_method", "spectral_init"]
    given = explicitly_given(parser, names, ["--spectral_conditioning", "--spectral_method", "identity"])
    assert given == {"spectral_method"}
