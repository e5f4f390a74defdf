"""Facts about public data sets that a model card has to state: their terms, and what a reader of figures must know."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataTerms:
    """Facts about one data set."""

    licence: str
    notes: str = ""


_KNOWN = {
    "bccd": DataTerms(
        licence="MIT (BCCD, Shenggan Cheng and contributors)",
        notes="Many overlapping or cut red cells carry no box, so the precision of RBC is under-estimated.",
    ),
    "cifar10": DataTerms(
        licence="CIFAR-10 states no licence; its author asks to cite the technical report",
        notes="The images were re-encoded as JPEG of about quality 75 before training and test: not exactly comparable "
        "with figures on the original pixels.",
    ),
}


def data_terms(name: str) -> DataTerms:
    """The facts about the data set of that name, by the name of its folder."""
    return _KNOWN.get(name, DataTerms(licence="not stated"))
