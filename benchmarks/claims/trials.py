"""The trainings behind the claims: factors, recipe, settings and measurement of each."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

Factor = str | float | int

SEEDS = (0, 1, 2)
ARCHITECTURES = ("vit", "mixer", "bit")
# Fraction of the training images: epochs.
FRACTIONS = {0.01: 30, 0.03: 20, 0.1: 10, 0.3: 5, 1.0: 2}
ONE_SEED_FROM = 0.3  # larger fractions are trained with one seed
WIDTHS = (32, 64, 128)
DEPTHS, WARMUPS, LEARNING_RATES, NORMS = (4, 12), (0, 1), (1e-3, 3e-3, 1e-2), ("pre", "post")
POSITIONS = ("none", "learned", "sine_1d", "sine_2d")
QUERIES = (10, 25, 50, 100)  # images have up to 30 objects, 13 on average
STRONG = (
    "augmentation.crop=shift",
    "augmentation.flip=0.5",
    "augmentation.randaugment_ops=2",
    "augmentation.cutmix=1.0",
    "label_smoothing=0.1",
)
WEAK = ("augmentation.crop=shift", "augmentation.flip=0.5", "augmentation.randaugment_ops=1")


@dataclass(frozen=True)
class Trial:
    """One training."""

    claim: str
    measure: str  # key of `measure.MEASURES`
    factors: tuple[tuple[str, Factor], ...]  # varied by the claim, and the seed
    recipe: str
    data: str  # subfolder of the data folder
    settings: tuple[str, ...]  # `key=value` overrides of the recipe

    @property
    def name(self) -> str:
        """Unique name, used as the folder name."""
        return "-".join((self.claim, *(f"{key}_{value}" for key, value in self.factors))).replace(" ", "_")


def trials() -> list[Trial]:
    """Return all trials in the order of the claims."""
    makers = (learning_rates, little_data, overfitting, stability, positions, queries)
    return [trial for make in makers for trial in make()]


def learning_rates() -> Iterator[Trial]:
    """Not a claim: the search for the learning rates of the `claim_*` recipes, on held-out images."""
    for architecture, lr in itertools.product(ARCHITECTURES, (2e-3, 4e-3, 8e-3, 1.6e-2)):
        yield _cifar10(
            "learning-rate",
            "held_out",
            {"architecture": architecture, "lr": lr},
            f"claim_{architecture}",
            *("train_fraction=0.1", "epochs=4", "evaluate_every=4", f"lr={lr}"),
        )


def little_data() -> Iterator[Trial]:
    """Networks of equal compute on fractions of the training images, without and with strong augmentation."""
    for fraction, augmentation, architecture in itertools.product(FRACTIONS, ("none", "strong"), ARCHITECTURES):
        for seed in SEEDS if fraction < ONE_SEED_FROM else SEEDS[:1]:
            yield _cifar10(
                "little-data",
                "accuracy",
                {"architecture": architecture, "augmentation": augmentation, "fraction": fraction, "seed": seed},
                f"claim_{architecture}",
                *(
                    f"train_fraction={fraction}",
                    f"epochs={FRACTIONS[fraction]}",
                    f"evaluate_every={FRACTIONS[fraction]}",
                ),
                f"seed={seed}",
                *(STRONG if augmentation == "strong" else ()),
            )


def overfitting() -> Iterator[Trial]:
    """ViTs of three widths, 750 steps on a tenth of the images, with and without regularisation."""
    regularisations: dict[str, tuple[str, ...]] = {
        "none": (),
        "augmentation": WEAK,
        "drop path, weight decay": ("model.drop_path=0.2", "weight_decay=0.3"),
        "ten times the images": ("train_fraction=1.0", "epochs=1", "warmup_epochs=0.1"),
    }
    for width, (name, settings) in itertools.product(WIDTHS, regularisations.items()):
        yield _cifar10(
            "overfitting",
            "gap",
            {"width": width, "regularisation": name},
            "claim_vit",
            *("train_fraction=0.1", "epochs=10", f"model.embed_dim={width}", f"model.num_heads={width // 32}"),
            *settings,
        )


def stability() -> Iterator[Trial]:
    """Pre-norm and post-norm with AdamW, without gradient clipping, at increasing learning rates."""
    for depth, warmup, lr, norm in itertools.product(DEPTHS, WARMUPS, LEARNING_RATES, NORMS):
        yield _cifar10(
            "stability",
            "survival",
            {"norm": norm, "depth": depth, "lr": lr, "warmup": warmup},
            "claim_vit",
            *(f"model.norm={norm}", f"model.depth={depth}", f"lr={lr}", f"warmup_epochs={warmup}"),
            *("train_fraction=0.1", "epochs=3", "evaluate_every=3", "optimizer=adamw", "clip_grad=1e9"),
        )


def positions() -> Iterator[Trial]:
    """The same ViT with and without position embeddings, evaluated on ordered and shuffled patches."""
    for seed, kind in itertools.product(SEEDS, POSITIONS):
        yield _cifar10(
            "positions",
            "accuracy_without_order",
            {"positions": kind, "seed": seed},
            "claim_vit",
            *("train_fraction=0.1", "epochs=8", "evaluate_every=8", f"model.pos_embed={kind}", f"seed={seed}", *WEAK),
        )


def queries() -> Iterator[Trial]:
    """DETR with fewer and more queries than an image has objects."""
    for count in QUERIES:
        yield Trial(
            "queries",
            "detection",
            (("queries", count),),
            "detr_bccd",
            "bccd",
            (
                *(f"model.num_queries={count}", "epochs=8", "evaluate_every=8"),
                *("optimizer=muon", "lr=1e-3", "precision=bfloat16"),
            ),
        )


def _cifar10(claim: str, measure: str, factors: dict[str, Factor], recipe: str, *settings: str) -> Trial:
    return Trial(claim, measure, tuple(factors.items()), recipe, "cifar10", settings)
