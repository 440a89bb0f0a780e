"""What learning took: optimizer steps, rows, and the networks that these went through.

Accuracies of two algorithms can only be compared beside what each of them was given. Like the
simulated clock this is counted and not timed, so the same settings and seed give the same numbers
on any machine, in any backend, and in a resumed run.

A run counts rows by the network that they went through. Operations are those rows times what a row
costs, which takes torch's counter seconds to load: whoever shows them computes them.

Judging models is no part of it. Nor is what a server computes without one of its models: averages,
coefficients, gates, and generators, which are trained by steps of their own.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from torch import nn

from fedkd import own_code
from fedkd.compression.cost import row_flops
from fedkd.inputs import InputShape, Shape, input_shape_of
from fedkd.models import ModelSettings, build_model
from fedkd.training import Network, RowFlops, Work
from strategies.contract import Strategy

Cost = TypeVar("Cost")

PREFIX = "effort_"
"""Begins what a client reports of its effort, which is summed up and in no row of its own."""

_PLACE = re.compile("0|[1-9][0-9]{0,3}")
_UNKNOWN = "other"
"""Stands for a network that nobody announced."""


def networks_of(strategy: Strategy[Any, Any]) -> tuple[Network, ...]:
    """Return every network that clients and server of a run have, each once, in a fixed order."""
    federation = strategy.federation
    clients = [
        Network(model, input_shape_of(federation.shape_of(client)))
        for client in federation.first_clients.values()
        for model in _models_of(strategy, client)
    ]
    servers = [
        Network(each.model, input_shape_of(each.input_shape or federation.input_shape))
        for each in strategy.server_models().values()
    ]
    return tuple(dict.fromkeys([*clients, *servers]))


def _models_of(strategy: Strategy[Any, Any], client: int) -> Sequence[ModelSettings]:
    architecture = strategy.architecture(client)
    return [*architecture.values()] if isinstance(architecture, Mapping) else [architecture]


@dataclass(frozen=True)
class Effort:
    """What learning took.

    Attributes:
        steps: of optimizers, one for each model that learns in it.
        trained: rows that a network learnt from, private and public ones, each as often as it was
            used, by its place in `networks_of`.
        predicted: rows that went through it forwards only, to teach or to be sent.
    """

    steps: int = 0
    trained: Counter[str] = field(default_factory=Counter)
    predicted: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, work: Work, networks: Sequence[Network]) -> "Effort":
        """Return the effort behind some work."""
        places = {network: str(place) for place, network in enumerate(networks)}

        def by_place(rows: Mapping[Network, int]) -> Counter[str]:
            found: Counter[str] = Counter()
            for network, count in rows.items():
                found[places.get(network, _UNKNOWN)] += count
            return found

        return cls(work.steps, by_place(work.trained), by_place(work.predicted))

    @property
    def rows(self) -> int:
        """Rows that models learnt from."""
        return self.trained.total()

    def plus(self, other: "Effort") -> "Effort":
        """Return both together."""
        return Effort(
            self.steps + other.steps,
            self.trained + other.trained,
            self.predicted + other.predicted,
        )

    @property
    def metrics(self) -> dict[str, float]:
        """As a client reports it."""
        by_kind = {f"{PREFIX}{key}": float(value) for key, value in self.by_network.items()}
        return {f"{PREFIX}steps": float(self.steps), **by_kind}

    @classmethod
    def taken(cls, metrics: MutableMapping[str, float]) -> "Effort":
        """Take what a client reported of its effort out of its metrics.

        Whatever it calls its networks: what is no place of one counts for an unknown one.
        """
        own = {
            key.removeprefix(PREFIX): max(0, int(metrics.pop(key)))
            for key in list(metrics)
            if key.startswith(PREFIX)
        }
        rows: dict[str, Counter[str]] = {"trained": Counter(), "predicted": Counter()}
        for key, count in own.items():
            kind, _, place = key.partition("_")
            if kind in rows:
                rows[kind][place if _PLACE.fullmatch(place) else _UNKNOWN] += count
        return cls(own.get("steps", 0), rows["trained"], rows["predicted"])

    @property
    def by_network(self) -> dict[str, int]:
        """Rows by kind and network, as they stand in the federation's row of a round."""
        return {
            f"{kind}_{place}": count
            for kind in ("trained", "predicted")
            for place, count in sorted(getattr(self, kind).items())
        }

    def row(self, whose: str) -> dict[str, int]:
        """As it stands in the federation's row of a round; nothing where nobody learnt.

        Args:
            whose: ``client`` or ``server``.
        """
        return {f"{whose}_steps": self.steps, f"{whose}_rows": self.rows} if self.steps else {}


# -- operations ----------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _row_flops(
    model: str, sides: tuple[int, ...], vocabulary: int | None, num_classes: int
) -> RowFlops:
    module, shape = _built(model, sides, vocabulary, num_classes)
    return row_flops(module, shape)


@lru_cache(maxsize=1024)
def _parameters(
    model: str, sides: tuple[int, ...], vocabulary: int | None, num_classes: int
) -> int:
    module, _ = _built(model, sides, vocabulary, num_classes)
    return sum(each.numel() for each in module.parameters())


def _built(
    model: str, sides: tuple[int, ...], vocabulary: int | None, num_classes: int
) -> tuple[nn.Module, Shape]:
    try:
        shape: Shape = InputShape(sides, vocabulary)
    except ValueError:
        # Of features that another network puts out.
        shape = sides
    settings = ModelSettings.model_validate_json(model)
    return build_model(settings, input_shape=shape, num_classes=num_classes, seed=0), shape


def network_rows(networks: Sequence[Network], num_classes: int) -> list[dict[str, Any]]:
    """Return networks as plain values, for the record."""
    return [
        {
            "model": each.model.model_dump(mode="json"),
            "sides": list(each.input_shape),
            "vocabulary": getattr(each.input_shape, "vocabulary", None),
            "classes": num_classes,
        }
        for each in networks
    ]


def operations(
    rows: Sequence[Mapping[str, Any]], networks: Sequence[Mapping[str, Any]]
) -> float | None:
    """Return the floating-point operations of a run: forwards and backwards, losses left out.

    Args:
        rows: of the federation, one a round.
        networks: what `network_rows` wrote.

    Returns:
        None where they cannot be counted: a network that is not known, or one of the user's own.
    """
    total = 0
    for row in rows:
        for kind in ("trained", "predicted"):
            start = f"{kind}_"
            for key in (key for key in row if key.startswith(start)):
                place = key.removeprefix(start)
                if not place.isdigit() or int(place) >= len(networks):
                    return None
                cost = _cost_of(networks[int(place)], _row_flops)
                if cost is None:
                    return None
                total += int(row[key]) * int(getattr(cost, kind))
    return float(total)


def parameters(network: Mapping[str, Any]) -> int | None:
    """Return how many numbers a network learns; None where it is not known, or the user's own.

    Args:
        network: one of those that `network_rows` wrote.
    """
    return _cost_of(network, _parameters)


def _cost_of(network: Mapping[str, Any], cost: Callable[..., Cost]) -> Cost | None:
    """Return what a network costs by a function of what `network_rows` wrote of it."""
    try:
        if own_code.is_own_code(network["model"]["name"]):
            # Reading a record runs nobody's code.
            return None
        model = ModelSettings.model_validate(network["model"])
        sides, vocabulary = tuple(network["sides"]), network["vocabulary"]
        return cost(model.model_dump_json(), sides, vocabulary, int(network["classes"]))
    except Exception:
        # Of another version, or what torch's counter cannot follow; a number that is only for
        # information ends no report.
        return None
