"""What a layout is: the names and shapes under which someone publishes a network, and how they become ours.

A layout is written as a literal table from our names to theirs. Conversion is strict: every tensor of the network must
come from the file, every tensor of the file must be used or be known to be of no use, and every shape must fit.
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


@dataclass(frozen=True)
class Rule:
    """Our tensor `target` is `transform` of the file's `sources`.

    Names hold {i} and {j} for indices; a source may also count from one ({i1}, {j1}).
    """

    target: str
    sources: tuple[str, ...]
    transform: Callable[..., Tensor]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches what `target` names."""
        return _pattern(self.target)

    def source_names(self, target: str) -> list[str] | None:
        """The names in the file for one of our tensors, None if this rule is not about it."""
        match = self.pattern.fullmatch(target)
        if match is None:
            return None
        indices = {name: int(value) for name, value in match.groupdict().items()}
        indices |= {f"{name}1": value + 1 for name, value in indices.items()}
        return [source.format(**indices) for source in self.sources]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w)\\\}", r"(?P<\1>\\d+)", re.escape(name)))


def _same(x: Tensor) -> Tensor:
    return x


def rule(target: str, *sources: str, transform: Callable[..., Tensor] = _same) -> Rule:
    """One of our tensors."""
    return Rule(target, sources, transform)


def rules(
    target: str, *sources: str, parts: Iterable[str] = ("weight", "bias"), transform: Callable[..., Tensor] = _same
) -> tuple[Rule, ...]:
    """Our tensors `target.weight` and `target.bias`, which the file calls the same."""
    return tuple(rule(f"{target}.{part}", *(f"{s}.{part}" for s in sources), transform=transform) for part in parts)


_TORCH_PREFIXES = ("", "module.", "_orig_mod.", "model.")  # of DistributedDataParallel, torch.compile, Lightning


@dataclass(frozen=True)
class Layout:
    """How a network is published.

    Attributes:
        name: for people.
        architecture: the key of `models.build.ARCHITECTURES`.
        signature: keys that every file of this layout has, after prefix and aliases.
        rules: every tensor of our network.
        settings: the network's settings, from the shapes in the file and what was published beside it.
        preprocessing: the family's published defaults, without what the network's settings say.
        prefixes: what may stand before every key, with patterns of the keys that then lie beside the network.
        aliases: pattern and replacement, from other names of the same thing to those in the rules.
        ignored: patterns of keys that hold nothing that the network needs.
        prepare: from the tensors as they are in the file to those that the rules speak of.
        head: our names of the last layer, which depends on the labels.
        model_type: that of a Hugging Face `config.json`.
        timm_names: how the architectures begin in a `config.json` of timm.
    """

    name: str
    architecture: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...]
    settings: Callable[[Tensors, Mapping[str, Any]], Settings]
    preprocessing: Mapping[str, Any]
    head: tuple[str, str] = ("head.weight", "head.bias")
    prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: dict.fromkeys(_TORCH_PREFIXES, ()))
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    prepare: Callable[[Tensors, Mapping[str, Any]], Tensors] = lambda tensors, _: tensors
    model_type: str | None = None
    timm_names: tuple[str, ...] = ()

    def canonical(self, tensors: Tensors, prefix: str) -> Tensors:
        """The file's tensors under the names in the rules."""
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
                name = f"{key} (beside another {name})"  # which makes it unexpected
            renamed[name] = tensor
        return renamed

    def find_prefix(self, tensors: Tensors) -> str | None:
        """The prefix under which the file has this layout, None if it has not."""
        for prefix in self.prefixes:
            if any(key.startswith(prefix) for key in tensors) and set(self.signature) <= set(
                self.canonical(tensors, prefix)
            ):
                return prefix
        return None

    def known_share(self, tensors: Tensors) -> float:
        """The part of the file's keys that could be of this layout, 0 to 1."""
        shapes = {_numberless(source) for rule_ in self.rules for source in rule_.sources}
        names = [_numberless(name) for name in self.canonical(tensors, "")]
        return sum(name in shapes for name in names) / max(1, len(names))


def _numberless(name: str) -> str:
    return re.sub(r"\{\w+(:\w+)?\}|\d+", "#", name)


def count(tensors: Tensors, name: str, **indices: int) -> int:
    """How many units there are: the highest index among the keys that begin as `name` does, up to its {n} or {n1}.

    {n} counts from zero, {n1} from one. Units that miss the very tensor of `name` are counted, and missed later.
    """
    start, _, rest = name.partition("{n")
    pattern = re.compile(re.escape(start.format(**indices)) + r"(\d+)(?!\d)")
    numbers = (int(match[1]) + (rest[0] != "1") for key in tensors if (match := pattern.match(key)))
    return max((number for number in numbers if number <= len(tensors)), default=0)


def convert(
    layout: Layout, tensors: Tensors, network: Mapping[str, Tensor], *, file: object, skip: Iterable[str] = ()
) -> dict[str, Tensor]:
    """The weights of our network from the tensors of a file, float32.

    Args:
        tensors: under the names in the layout's rules.
        network: names and shapes of our network, on any device (also "meta").
        skip: tensors of the network that are not to be read.

    Raises:
        MismatchError: listing all that is missing, unexpected or of another shape.
        WeightsError: numbers in it are not finite.
    """
    weights: dict[str, Tensor] = {}
    for target, rule_, names in _plan(layout, tensors, network, file, set(skip)):
        parts = [tensors[name].read() for name in names]
        if not all(part.is_floating_point() for part in parts):
            raise WeightsError(f"{file}: {', '.join(names)}: expected floating-point numbers, found {parts[0].dtype}")
        weight = rule_.transform(*parts).to(torch.float32)
        if not torch.isfinite(weight).all():
            raise WeightsError(f"{file}: {', '.join(names)}: expected finite numbers, found others")
        # A view would drag the whole tensor that it is cut from into the run.
        whole = weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes
        weights[target] = weight if whole else weight.clone(memory_format=torch.contiguous_format)
    return weights


def _plan(
    layout: Layout, tensors: Tensors, network: Mapping[str, Tensor], file: object, skipped: set[str]
) -> list[tuple[str, Rule, list[str]]]:
    """Each tensor of our network with its rule and its sources, once all is known to fit."""
    plan: list[tuple[str, Rule, list[str]]] = []
    used: set[str] = set()
    missing: dict[str, None] = {}  # a set that keeps its order
    shapes: dict[str, tuple[object, object]] = {}
    for target, expected in network.items():
        found = next(((r, names) for r in layout.rules if (names := r.source_names(target)) is not None), None)
        if found is None:
            if target not in skipped:
                missing[f"anything for our {target}"] = None
            continue
        rule_, names = found
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
    """The shape that the rule makes, None if it cannot be applied to such shapes."""
    try:
        return tuple(rule_.transform(*(torch.empty(shape, device="meta") for shape in sources)).shape)
    except (RuntimeError, ValueError, IndexError):
        return None
