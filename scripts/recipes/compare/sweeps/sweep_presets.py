"""The sweeps that have a name: tables 1 and 5 to 7 of the conditioning paper, and the controls that its claim needs.

At scale "small" they train small models of the five families on scikit-learn's digits, on a CPU; at scale "paper" they are
the paper's experiments on ImageNet-1k with the published recipes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from .design import Flags, Setting, Sweep, Tuning, Variant

IMAGE_SCRIPT = "train_image_classification.py"
SCALES = ("small", "paper")
TUNED = "tuned scale"

# Eight passes: the stock model from its own start is not at its end then, that from a tuned start nearly is.
SMALL_RECIPE: Flags = (
    *("--num_train_epochs", "8"),
    *("--warmup_epochs", "2"),
    *("--save_steps", "0"),
    *("--logging_steps", "100"),
)
# Scales and strengths are chosen by other images than those that results are of.
HELD_OUT: Flags = ("--held_out_share", "0.25")
VIT = Setting("ViT")  # the script's own
# Architectures of timm, cut down to width 64 (Swin and DaViT: 32 and 64) and few layers.
FAMILIES = (
    VIT,
    Setting(
        "DeiT",
        (
            *("--timm_model", "deit_tiny_patch16_224"),
            *(
                "--timm_model_args",
                '{"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 6, "num_heads": 4, "mlp_ratio": 2}',
            ),
            # What DeiT adds to ViT is its recipe.
            *("--mixup", "0.8", "--cutmix", "1.0", "--label_smoothing", "0.1"),
        ),
    ),
    Setting(
        "Swin",
        (
            *("--timm_model", "swin_tiny_patch4_window7_224"),
            *(
                "--timm_model_args",
                '{"img_size": 8, "patch_size": 1, "window_size": 4, "embed_dim": 32, "depths": [2, 2], '
                '"num_heads": [2, 4], "mlp_ratio": 2}',
            ),
        ),
    ),
    Setting(
        "XCiT",
        (
            *("--timm_model", "xcit_nano_12_p8_224"),
            *(
                "--timm_model_args",
                '{"img_size": 32, "embed_dim": 64, "depth": 4, "cls_attn_layers": 1, "num_heads": 4, "mlp_ratio": 2}',
            ),
        ),
    ),
    Setting(
        "DaViT",
        (
            *("--timm_model", "davit_tiny", "--image_size", "32"),
            *(
                "--timm_model_args",
                '{"depths": [1, 1], "embed_dims": [32, 64], "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 2}',
            ),
        ),
    ),
)
PAPER_SETTINGS = tuple(
    Setting(label, ("--preset", preset))
    for label, preset in (
        ("ViT-B", "vit-base"),
        ("DeiT-B", "deit-base"),
        ("Swin-B", "swin-base"),
        ("XCiT-M", "xcit-medium"),
        ("DaViT-B", "davit-base"),
    )
)

PAPER_LAMBDAS = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0)
SMALL_LAMBDAS = (0.3, 0.5, 1.0, *PAPER_LAMBDAS)
SEEDS = tuple(range(5))
TUNING_SEEDS = (1000, 1001)

SCALE = Tuning("scale", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), ("--initialization_scale", "{value}"))
LAMBDA = Tuning("lambda", (0.1, 0.3, 1.0, 3.0), ("--spectral_conditioning", "True", "--lambda_", "{value}"))
AT_TUNED_SCALE: Flags = ("--initialization_scale", "{scale}")

STOCK = Variant("stock")
TUNED_STOCK = Variant(f"stock, {TUNED}", AT_TUNED_SCALE, start=TUNED)


def identity(strength: float | str, *flags: str, label: str = "") -> Variant:
    """The identity correction; a name in braces stands for a tuned strength."""
    number = strength if isinstance(strength, float) else None
    name = f"identity, lambda {strength:g}" if isinstance(strength, float) else "identity, tuned lambda"
    text = f"{strength:g}" if isinstance(strength, float) else strength
    return Variant(name + label, ("--spectral_conditioning", "True", "--lambda_", text, *flags), number)


def svd(*flags: str, label: str = "") -> Variant:
    """The SVD-based correction."""
    return Variant(f"svd{label}", ("--spectral_conditioning", "True", "--spectral_method", "svd", *flags))


SVD_STATIC = svd(label=", static")
SVD_EACH_STEP = svd("--spectral_refresh_every", "1", label=", each step")
SVD_SOMETIMES = svd("--spectral_refresh_every", "20", label=", every 20 steps")

NORM_OF_TUNED = Variant("stock, norm of identity, tuned lambda", ("--match_norm_of", "identity={lambda}"))
NORM_OF_ONE = Variant("stock, norm of identity, lambda 1", ("--match_norm_of", "identity=1"))
NORM_OF_SVD = Variant("stock, norm of svd", ("--match_norm_of", "svd"))

ROW: Flags = ("--attention_preconditioner", "row")
ROW_AT_STOCK_NORM = Variant("row preconditioner, stock norm", (*ROW, "--preconditioner_scale", "match"))
MIMETIC = Variant("mimetic", ("--projection_init", "mimetic"))
CONDITIONED_START = Variant("conditioned initialization", ("--projection_init", "conditioned"))

TABLE_1 = (
    "Table 1 of the paper: top-1 accuracy on ImageNet-1k, five seeds",
    (
        ("model", "ViT-B", "DeiT-B", "Swin-B", "XCiT-M", "DaViT-B"),
        ("original", "80.7 ± 0.41", "81.6 ± 0.30", "83.4 ± 0.28", "82.6 ± 0.39", "84.3 ± 0.26"),
        ("conditioned", "81.7 ± 0.38", "82.6 ± 0.32", "84.1 ± 0.25", "83.5 ± 0.35", "84.9 ± 0.21"),
    ),
)
TABLE_5 = (
    "Table 5 of the paper: ViT-B, accuracy by lambda",
    (
        ("lambda", *(f"{value:g}" for value in PAPER_LAMBDAS)),
        ("ViT-B", "80.8", "81.1", "81.4", "81.6", "81.7", "81.7", "81.6", "81.5"),
    ),
)
TABLE_6 = (
    "Table 6 of the paper",
    (
        *TABLE_1[1][:2],
        ("conditioned, with layer norm", *TABLE_1[1][2][1:]),
        ("conditioned, no layer norm", "79.8 ± 0.31", "80.4 ± 0.33", "80.5 ± 0.23", "80.0 ± 0.35", "80.3 ± 0.21"),
    ),
)
TABLE_7 = (
    "Table 7 of the paper (hours:minutes)",
    (
        ("model", "accuracy", "training time"),
        *(
            (f"{model} {method}", accuracy, time)
            for model, rows in {
                "ViT-B": (("80.7", "29:29"), ("82.0", "41:38"), ("81.7", "29:33")),
                "DeiT-B": (("81.6", "26:16"), ("82.9", "37:54"), ("82.6", "26:24")),
                "Swin-B": (("83.4", "53:12"), ("84.3", "68:32"), ("84.1", "53:26")),
                "XCiT-M": (("82.6", "91:03"), ("83.9", "109:12"), ("83.5", "91:18")),
                "DaViT-M": (("84.3", "75:09"), ("85.2", "93:12"), ("84.9", "75:28")),
            }.items()
            for method, (accuracy, time) in zip(("original", "svd", "identity"), rows)
        ),
    ),
)


def table1(scale: str, scripts: Path) -> Sweep:
    """Five models, stock and conditioned; small with the controls for scale."""
    small = (
        STOCK,
        TUNED_STOCK,
        replace(identity("{lambda}"), control=NORM_OF_TUNED.label),
        identity(10.0),
        replace(SVD_STATIC, control=NORM_OF_SVD.label),
        replace(SVD_SOMETIMES, control=NORM_OF_SVD.label),
        NORM_OF_TUNED,
        NORM_OF_SVD,
    )
    sweep = _sweep("table1", "Five families, stock and conditioned", scale, scripts, small, (STOCK, identity(10.0)))
    if scale == "paper":
        return replace(sweep, published=TABLE_1)
    return replace(
        sweep,
        seeds=SEEDS[:3],
        tunings=(SCALE, LAMBDA),
        tuning_seeds=TUNING_SEEDS,
        second_references=(TUNED_STOCK.label,),
        published=TABLE_1,
    )


def table5(scale: str, scripts: Path) -> Sweep:
    """The strength of the identity correction, of a ViT."""
    small = (STOCK, *map(identity, SMALL_LAMBDAS), TUNED_STOCK)
    paper = (STOCK, *map(identity, PAPER_LAMBDAS))
    sweep = _sweep("table5", "Accuracy by lambda", scale, scripts, small, paper, layout="variants", published=TABLE_5)
    sweep = replace(sweep, settings=sweep.settings[:1])
    if scale == "paper":
        return sweep
    return replace(sweep, tunings=(SCALE,), tuning_seeds=TUNING_SEEDS, second_references=(TUNED_STOCK.label,))


def table6(scale: str, scripts: Path) -> Sweep:
    """With and without layer norm; the paper leaves out the stock models without."""
    norms = ("--no_layer_norm", "True")
    without = Variant("stock, no layer norm", norms)
    small = (
        *(STOCK, identity(1.0), identity(10.0)),
        *(without, identity(1.0, *norms, label=", no layer norm"), identity(10.0, *norms, label=", no layer norm")),
    )
    paper = (STOCK, identity(10.0), without, identity(10.0, *norms, label=", no layer norm"))
    sweep = _sweep("table6", "With and without layer norm", scale, scripts, small, paper, published=TABLE_6)
    return replace(sweep, seeds=SEEDS[:3]) if scale == "small" else sweep


def table7(scale: str, scripts: Path) -> Sweep:
    """Accuracy and training time of both corrections."""
    small = (STOCK, SVD_EACH_STEP, SVD_SOMETIMES, SVD_STATIC, identity(1.0))
    paper = (STOCK, SVD_EACH_STEP, svd("--spectral_refresh_every", "10", label=", every 10 steps"), identity(10.0))
    title = "Accuracy and training time"
    sweep = _sweep("table7", title, scale, scripts, small, paper, layout="time", published=TABLE_7)
    return replace(sweep, seeds=SEEDS[:3]) if scale == "small" else sweep


def evidence(scale: str, scripts: Path) -> Sweep:
    """Is it the conditioning, or the scale? A ViT with every control, from its own start and from a tuned one."""
    controls = {"identity, lambda 1": NORM_OF_ONE.label, SVD_STATIC.label: NORM_OF_SVD.label}
    starts = [replace(item, control=controls.get(item.label)) for item in _from_own_start()]
    tuned = [
        Variant(f"{item.label}, {TUNED}", (*AT_TUNED_SCALE, *item.flags), item.strength, TUNED) for item in starts
    ]
    variants = (*starts, NORM_OF_ONE, NORM_OF_SVD, MIMETIC, *tuned)
    sweep = _sweep("evidence", "Conditioning, or scale?", scale, scripts, variants, variants)
    return replace(
        sweep,
        settings=sweep.settings[:1],
        tunings=(SCALE,),
        tuning_seeds=TUNING_SEEDS,
        second_references=(TUNED_STOCK.label,),
    )


def precondition(scale: str, scripts: Path) -> Sweep:
    """The second source beside the first, and both against controls: of the scale, and of the start."""
    row = Variant("row preconditioner", ROW, control=ROW_AT_STOCK_NORM.label)
    controls = (STOCK, ROW_AT_STOCK_NORM, CONDITIONED_START)
    treated = (row, svd(*ROW, label=" + row preconditioner"), svd())
    small = (*controls, TUNED_STOCK, *treated, identity("{lambda}"))
    paper = (*controls, *treated, identity(10.0))
    sweep = _sweep("precondition", "Preconditioned attention, and its controls", scale, scripts, small, paper)
    sweep = replace(sweep, settings=sweep.settings[:1], second_references=tuple(control.label for control in controls))
    if scale == "paper":
        return sweep
    references = (*sweep.second_references, TUNED_STOCK.label)
    return replace(sweep, tunings=(SCALE, LAMBDA), tuning_seeds=TUNING_SEEDS, second_references=references)


def _from_own_start() -> list[Variant]:
    query, value = ("--spectral_targets", "query"), ("--spectral_targets", "value")
    heads, refreshed = ("--spectral_granularity", "head"), ("--spectral_refresh_every", "20")
    return [
        STOCK,
        *map(identity, (0.3, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 16.0)),
        *(identity(strength, *query, label=", query alone") for strength in (1.0, 4.0, 10.0)),
        *(identity(strength, *value, label=", value alone") for strength in (1.0, 4.0, 10.0)),
        identity(1.0, *heads, label=", per head"),
        *(SVD_STATIC, svd(*heads, label=", static, per head")),
        *(SVD_SOMETIMES, svd(*refreshed, *heads, label=", every 20 steps, per head")),
        Variant("orthogonal", ("--projection_init", "orthogonal")),
    ]


def _sweep(
    name: str,
    title: str,
    scale: str,
    scripts: Path,
    small: Sequence[Variant],
    paper: Sequence[Variant],
    layout: str = "settings",
    published: tuple[str, tuple[tuple[str, ...], ...]] | None = None,
) -> Sweep:
    script = scripts / IMAGE_SCRIPT
    if scale == "paper":
        return Sweep(name, title, script, PAPER_SETTINGS, tuple(paper), SEEDS, layout, published=published)
    sweep = Sweep(name, title, script, FAMILIES, tuple(small), SEEDS, layout, SMALL_RECIPE, published=published)
    return replace(sweep, tuning_flags=HELD_OUT)


SWEEPS: dict[str, Callable[[str, Path], Sweep]] = {
    "table1": table1,
    "table5": table5,
    "table6": table6,
    "table7": table7,
    "evidence": evidence,
    "precondition": precondition,
}
