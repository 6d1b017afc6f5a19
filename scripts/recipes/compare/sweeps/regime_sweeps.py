"""The sweeps that ask in which regime a better conditioned matrix of the same norm wins, against the best controls.

They train the small ViT on scikit-learn's digits; other images by flags behind `--`, such as `-- --idx_dir fashion-mnist
--patch_size 4`. Scales and the learning rate are tuned one after the other, on other images and seeds.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .design import Flags, Setting, Sweep, SweepError, Tuning, Variant
from .sweep_presets import HELD_OUT, IMAGE_SCRIPT, SEEDS, SMALL_RECIPE, STOCK, TUNING_SEEDS, identity, svd

DEPTHS = tuple(Setting(f"{depth} layers", ("--num_hidden_layers", str(depth))) for depth in (6, 12))

NO_RESIDUAL: Flags = ("--no_attention_residual", "True")
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
QUERY_KEY, VALUE_OUTPUT, ALL = ("query", "key"), ("value", "output"), ("query", "key", "value")


def scaled(query_key: str, value_output: str) -> Flags:
    numbers = f"query={query_key},key={query_key},value={value_output},output={value_output}"
    return ("--initialization_scale", numbers)


# Without the residual connection the usual start stays at chance: the signal shrinks in every layer.
TUNINGS = (
    Tuning("vo", (4.0, 8.0, 12.0, 16.0, 20.0, 28.0), (*NO_RESIDUAL, *scaled("8", "{value}"))),
    Tuning("qk", (1.0, 4.0, 8.0, 14.0, 20.0), (*NO_RESIDUAL, *scaled("{value}", "{vo}"))),
    Tuning("rate", RATES, (*NO_RESIDUAL, *scaled("{qk}", "{vo}"), "--learning_rate", "{value}")),
)
TUNED: Flags = (*scaled("{qk}", "{vo}"), "--learning_rate", "{rate}")
MONITORED: Flags = ("--spectral_monitor_every", "90")


def orthogonal(*targets: str) -> Flags:
    return ("--projection_init", "orthogonal", "--projection_init_targets", *targets)


def residual_free(scale: str, scripts: Path) -> Sweep:
    """Attention without its residual connection: which weights must be well conditioned, at the same norms."""
    _refuse_paper("residual_free", scale)
    at_norm = ("--match_norm_of", "stock")
    value_output = ("--spectral_targets", *VALUE_OUTPUT)
    treated = (
        Variant("orthogonal V", orthogonal("value")),
        Variant("orthogonal V and O", orthogonal(*VALUE_OUTPUT)),
        Variant("orthogonal Q and K", orthogonal(*QUERY_KEY)),
        Variant("orthogonal Q, K, V", orthogonal(*ALL)),
        svd(*value_output, *at_norm, label=" on V and O"),
        svd(*at_norm, label=" on Q, K, V"),
        svd("--spectral_refresh_every", "20", *at_norm, label=" on Q, K, V, every 20 steps"),
        svd(*value_output, "--spectral_refresh_every", "20", *at_norm, label=" on V and O, every 20 steps"),
        identity(1.0, *value_output, label=", on V and O"),
        identity(1.0),
    )
    start = Variant("conditioned initialization", ("--projection_init", "conditioned"))
    variants = (
        Variant("stock, tuned", (*NO_RESIDUAL, *TUNED)),
        *(replace(item, flags=(*NO_RESIDUAL, *TUNED, *item.flags)) for item in treated),
        replace(start, flags=(*NO_RESIDUAL, "--learning_rate", "{rate}", *start.flags)),
        Variant("with the residual", TUNED),
        Variant("with the residual, orthogonal V and O", (*TUNED, *orthogonal(*VALUE_OUTPUT))),
        Variant("with the residual, its own start"),
    )
    title = "Attention without its residual connection"
    return _sweep("residual_free", title, scripts, DEPTHS, variants, TUNINGS, common=MONITORED)


def strong_decay(scale: str, scripts: Path) -> Sweep:
    """Strong weight decay and a long training: a fixed C moves the center of the decay, and so do the controls."""
    _refuse_paper("strong_decay", scale)
    small = ("--hidden_size", "32", "--num_hidden_layers", "4", "--intermediate_size", "64")
    settings = tuple(
        Setting(f"decay {decay}", (*small, "--weight_decay", decay, "--learning_rate", "3e-3"))
        for decay in ("0.05", "5", "15")
    )
    controls = (
        Variant("no decay on Q, K, V", ("--no_decay_on", *ALL)),
        Variant("decay toward the start on Q, K, V", ("--decay_toward_start_on", *ALL)),
    )
    variants = (STOCK, *controls, svd(), identity(1.0), svd("--no_decay_on", *ALL, label=", no decay on Q, K, V"))
    sweep = _sweep("strong_decay", "Strong weight decay", scripts, settings, variants)
    return replace(sweep, common=_longer(16), second_references=tuple(control.label for control in controls))


def dynamic(scale: str, scripts: Path) -> Sweep:
    """A dynamic correction speeds rotations of W + C up: beside three times the scale and learning rate of Q, K, V."""
    _refuse_paper("dynamic", scale)
    three = ("--initialization_scale", "3")
    faster = ("--projection_learning_rate_factor", "3")
    controls = (
        Variant("scale 3", three),
        Variant("learning rate 3 on Q, K, V", faster),
        Variant("scale 3, learning rate 3 on Q, K, V", (*three, *faster)),
    )
    variants = (STOCK, *controls, svd("--spectral_refresh_every", "1", label=", each step"), svd(label=", static"))
    sweep = _sweep("dynamic", "A correction that follows W", scripts, DEPTHS[:1], variants)
    return replace(sweep, second_references=tuple(control.label for control in controls))


def _sweep(
    name: str,
    title: str,
    scripts: Path,
    settings: tuple[Setting, ...],
    variants: tuple[Variant, ...],
    tunings: tuple[Tuning, ...] = (),
    common: Flags = (),
) -> Sweep:
    script = scripts / IMAGE_SCRIPT
    sweep = Sweep(name, title, script, settings, variants, SEEDS, "settings", (*SMALL_RECIPE, *common), tunings)
    return replace(sweep, tuning_seeds=TUNING_SEEDS if tunings else (), tuning_flags=HELD_OUT if tunings else ())


def _longer(epochs: int) -> Flags:
    flags = list(SMALL_RECIPE)
    flags[flags.index("--num_train_epochs") + 1] = str(epochs)
    return tuple(flags)


def _refuse_paper(name: str, scale: str) -> None:
    if scale == "paper":
        raise SweepError(
            f"--scale paper: {name} is of no paper's table; leave it out, and give other images behind `--`."
        )


REGIME_SWEEPS: dict[str, Callable[[str, Path], Sweep]] = {
    "residual_free": residual_free,
    "strong_decay": strong_decay,
    "dynamic": dynamic,
}
