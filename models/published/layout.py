"""Layouts of published weights: names and shapes of a network's tensors, and their conversion to ours.

A layout is a literal table from our names to the published ones. Conversion is strict: every tensor of the network must
come from the file, every tensor of the file must be used or explicitly ignored, and every shape must match.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vitrine.models.published.errors import MismatchError, WeightsError
from vitrine.models.published.files import LazyTensor, Tensors

Settings = dict[str, Any]

# Mean and standard deviation that published networks normalise images with (RGB in 0..1), by timm's names.
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Rule:
    """Our tensor `target` is `transform` of the file's `sources`.

    {i} and {j} in names stand for indices; sources may also count from one ({i1}, {j1}).
    """

    target: str
    sources: tuple[str, ...]
    transform: Callable[..., Tensor]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Pattern of the names that `target` stands for."""
        return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(self.target)))

    def source_names(self, target: str) -> list[str] | None:
        """Return the file's names for one of our tensors; None if the rule does not apply to it."""
        match = self.pattern.fullmatch(target)
        if match is None:
            return None
        indices = {name: int(value) for name, value in match.groupdict().items()}
        indices |= {f"{name}1": value + 1 for name, value in indices.items()}
        return [source.format(**indices) for source in self.sources]


def _identity(x: Tensor) -> Tensor:
    return x


def rule(target: str, *sources: str, transform: Callable[..., Tensor] = _identity) -> Rule:
    """Rule of a single tensor."""
    return Rule(target, sources, transform)


def rules(
    target: str, *sources: str, parts: Iterable[str] = ("weight", "bias"), transform: Callable[..., Tensor] = _identity
) -> tuple[Rule, ...]:
    """Rules of a module's parameters, by default `weight` and `bias`, which have the same names in the file."""
    return tuple(rule(f"{target}.{part}", *(f"{s}.{part}" for s in sources), transform=transform) for part in parts)


def same_names(*modules: str) -> tuple[Rule, ...]:
    """Rules of modules that have the same names in the file."""
    return tuple(entry for module in modules for entry in rules(module, module))


_TORCH_PREFIXES = ("", "module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


@dataclass(frozen=True)
class Layout:
    """Layout in which a network is published.

    Attributes:
        name: display name.
        architecture: key of `models.build.ARCHITECTURES`.
        signature: keys that every file of this layout has, after prefix and aliases.
        rules: for every tensor of our network.
        settings: infers the network's settings from the shapes in the file and the published `config.json`.
        preprocessing: the family's published defaults, except those that follow from the network's settings.
        crop_border: pixels by which the resized image is larger than the crop; None: `crop_pct` says so.
        prefixes: possible prefixes of all keys, each with patterns of the keys outside the network that have none.
        aliases: pattern and replacement, from alternative names to those in the rules.
        ignored: patterns of keys that the network does not need.
        prepare: converts the file's tensors to those that the rules refer to.
        head: our names of the last layer, which depends on the labels.
        model_type: in a Hugging Face `config.json`.
        timm_names: prefixes of the `architecture` in a `config.json` of timm.
    """

    name: str
    architecture: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...]
    settings: Callable[[Tensors, Mapping[str, Any]], Settings]
    preprocessing: Mapping[str, Any]
    crop_border: int | None = None
    head: tuple[str, str] = ("head.weight", "head.bias")
    prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(_TORCH_PREFIXES, ()))
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    prepare: Callable[[Tensors, Mapping[str, Any]], Tensors] = lambda tensors, _: tensors
    model_type: str | None = None
    timm_names: tuple[str, ...] = ()

    def canonical(self, tensors: Tensors, prefix: str) -> Tensors:
        """Return the file's tensors under the names in the rules."""
        renamed: dict[str, LazyTensor] = {}
        for key, tensor in tensors.items():
            if not key.startswith(prefix):
                if not any(re.fullmatch(pattern, key) for pattern in self.prefixes[prefix]):
                    renamed[f"{key} (without {prefix})"] = tensor
                continue
            name = key.removeprefix(prefix)
            for pattern, replacement in self.aliases:
                name = re.sub(pattern, replacement, name)
            if name in renamed:
                name = f"{key} (duplicate of {name})"  # an unexpected key
            renamed[name] = tensor
        return renamed

    def find_prefix(self, tensors: Tensors) -> str | None:
        """Return the prefix with which the file has this layout; None if it does not have it."""
        for prefix in self.prefixes:
            if any(key.startswith(prefix) for key in tensors) and set(self.signature) <= set(
                self.canonical(tensors, prefix)
            ):
                return prefix
        return None

    def known_share(self, tensors: Tensors) -> float:
        """Share of the file's keys that this layout could have, 0 to 1."""
        known = {_without_indices(source) for rule_ in self.rules for source in rule_.sources}
        names = [_without_indices(name) for name in self.canonical(tensors, "")]
        return sum(name in known for name in names) / max(1, len(names))


def _without_indices(name: str) -> str:
    return re.sub(r"\{\w+(:\w+)?\}|\d+", "#", name)


def count(tensors: Tensors, name: str, **indices: int) -> int:
    """Count units by the highest index among the keys that begin like `name` up to its {n} or {n1}.

    {n} counts from zero, {n1} from one. Units without the tensor `name` count too; conversion reports it as missing.
    """
    start, _, rest = name.partition("{n")
    pattern = re.compile(re.escape(start.format(**indices)) + r"(\d+)(?!\d)")
    numbers = (int(match[1]) + (rest[0] != "1") for key in tensors if (match := pattern.match(key)))
    return max((number for number in numbers if number <= len(tensors)), default=0)


def convert(
    layout: Layout, tensors: Tensors, network: Mapping[str, Tensor], *, file: object, skip: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Convert the tensors of a file to the weights of our network, float32.

    Args:
        tensors: under the names in the layout's rules.
        network: our network's state dict, on any device (also "meta").
        skip: tensors of the network that are not read.

    Raises:
        MismatchError: lists all tensors that are missing, unexpected or of another shape.
        WeightsError: numbers are not finite, or not floating-point.
    """
    weights: dict[str, Tensor] = {}
    for target, rule_, names in _plan(layout, tensors, network, file, set(skip)):
        parts = [tensors[name].read() for name in names]
        if not all(part.is_floating_point() for part in parts):
            raise WeightsError(f"{file}: {', '.join(names)}: expected floating-point numbers, found {parts[0].dtype}")
        weight = rule_.transform(*parts).to(torch.float32)
        if not torch.isfinite(weight).all():
            raise WeightsError(f"{file}: {', '.join(names)}: expected finite numbers, found others")
        # A view would save the whole storage that it belongs to in the checkpoint.
        whole = weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
        weights[target] = weight if whole else weight.clone(memory_format=torch.contiguous_format)
    return weights


def _plan(
    layout: Layout, tensors: Tensors, network: Mapping[str, Tensor], file: object, skipped: set[str]
) -> list[tuple[str, Rule, list[str]]]:
    """Return each tensor of our network with its rule and sources, after checking names and shapes."""
    plan: list[tuple[str, Rule, list[str]]] = []
    used: set[str] = set()
    missing: dict[str, None] = {}  # an ordered set
    shapes: dict[str, tuple[object, object]] = {}
    for target, expected in network.items():
        match = next(((r, names) for r in layout.rules if (names := r.source_names(target)) is not None), None)
        if match is None:
            if target not in skipped:
                missing[f"a source of our {target}"] = None
            continue
        rule_, names = match
        used.update(names)
        if target in skipped:
            continue
        if absent := [name for name in names if name not in tensors]:
            missing |= dict.fromkeys(absent)
            continue
        sources = [tensors[name].shape for name in names]
        shape = _shape_after(rule_, sources)
        if shape != tuple(expected.shape):
            shapes[", ".join(names)] = tuple(expected.shape), shape or " and ".join(map(str, sources))
        plan.append((target, rule_, names))
    unexpected = [key for key in tensors if key not in used and not any(re.fullmatch(p, key) for p in layout.ignored)]
    if missing or unexpected or shapes:
        raise MismatchError(file, layout=layout.name, missing=list(missing), unexpected=unexpected, shapes=shapes)
    return plan


def _shape_after(rule_: Rule, sources: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape that the rule produces; None if it does not accept these shapes."""
    try:
        return tuple(rule_.transform(*(torch.empty(shape, device="meta") for shape in sources)).shape)
    except (RuntimeError, ValueError, IndexError):
        return None
