"""Every algorithm, under its name in settings and summaries."""

from __future__ import annotations

from fedloom.algorithms.base import Algorithm
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedmit import FedMIT
from fedloom.algorithms.fedpit import FedPIT
from fedloom.algorithms.fewfedpit import FewFedPIT
from fedloom.algorithms.fewfedweight import FewFedWeight
from fedloom.algorithms.flexlora import FlexLoRA
from fedloom.algorithms.local_only import LocalOnly
from fedloom.algorithms.self_augmented import SelfAugmented

ALGORITHMS: dict[str, type[Algorithm]] = {
    "fedavg": FedAvg,
    "flexlora": FlexLoRA,
    "fewfedpit": FewFedPIT,
    "fedpit": FedPIT,
    "fedmit": FedMIT,
    "fewfedweight": FewFedWeight,
    "local_only": LocalOnly,
    "self_augmented": SelfAugmented,
}
ALIASES = {"ppfedit": "fewfedpit"}  # its journal version


def canonical(name: str) -> str:
    """The one name of an algorithm that has several."""
    return ALIASES.get(name, name)


def title(name: str) -> str:
    """Its name in papers and in conversation; an unknown algorithm keeps the name given."""
    known = ALGORITHMS.get(canonical(name))
    return known.title if known else name


def cited(name: str) -> str:
    """Its title and its source."""
    known = ALGORITHMS.get(canonical(name))
    return f"{known.title} ({known.paper})" if known else name
