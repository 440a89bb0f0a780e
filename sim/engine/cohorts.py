"""Cutting the clients of a phase into cohorts, and choosing how each cohort trains.

What is in a cohort depends on the settings, the data and who takes part, never on workers or
times: stacked models may round differently in other company, and a seed has to give the same
bits on any machine of a type.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedkd.data import FederatedData
from fedkd.models import ModelSettings
from fedkd.training.backends import Backend, choose_backend
from sim.settings import Settings
from sim.wire.messages import Phase
from strategies.contract import Strategy

QUERY_CLIENTS = 256
"""Clients in a call that asks for nothing but an answer."""

Cohort = tuple[tuple[int, ...], Backend]


class CohortCutter:
    """Cuts clients into cohorts of one architecture and says which backend trains each."""

    def __init__(
        self,
        settings: Settings,
        data: FederatedData,
        strategy: Strategy[Any, Any],
    ) -> None:
        self._settings = settings
        self._engine = settings.engine
        self._num_classes = data.num_classes
        self._strategy = strategy
        self._rows = np.fromiter((len(rows) for rows in data.client_rows), np.int64)
        self._measured: dict[str, Backend] = {}
        self._trained_by: dict[str, set[Backend]] = {}

    def cut(self, clients: Sequence[int], phase: Phase) -> list[Cohort]:
        """Return cohorts: their members, sorted, and their backend.

        Members that train one after the other have no use for each other, so each is a cohort
        of its own; how many travel in one call is the grid's business.
        """
        if phase == "query":
            return [(tuple(part), "loop") for part in _parts(clients, QUERY_CLIENTS)]
        cohorts: list[Cohort] = []
        for group in self._by_architecture(clients):
            for members in self._stacks(group):
                backend = self._backend(members)
                if phase == "train":
                    label = self._model(members[0]).label
                    self._trained_by.setdefault(label, set()).add(backend)
                if backend == "loop":
                    cohorts.extend(((client,), backend) for client in members)
                else:
                    cohorts.append((tuple(members), backend))
        return cohorts

    def unsettled(self, clients: Iterable[int]) -> list[tuple[int, ...]]:
        """Return a cohort of each architecture whose backend is yet to be measured."""
        if self._engine.vectorize != "measure":
            return []
        groups = self._by_architecture(clients)
        return [
            tuple(self._stacks(group)[0])
            for group in groups
            if self._architecture(group[0]) not in self._measured
        ]

    def settle(self, members: Sequence[int], backend: Backend) -> None:
        """From now on, train clients of this architecture in this way."""
        self._measured[self._architecture(members[0])] = backend

    def choices(self) -> dict[str, Backend]:
        """Return the measured choices by architecture; empty unless ``vectorize: measure``."""
        return dict(self._measured)

    def trained_by(self) -> dict[str, list[Backend]]:
        """Return which backends have trained each model so far, by what the model is called."""
        return {label: sorted(backends) for label, backends in self._trained_by.items()}

    def recall(
        self, choices: Mapping[str, Backend], trained_by: Mapping[str, Sequence[Backend]]
    ) -> None:
        """Take back what `choices` and `trained_by` returned."""
        self._measured = dict(choices)
        self._trained_by = {label: set(backends) for label, backends in trained_by.items()}

    def _backend(self, members: Sequence[int]) -> Backend:
        model = self._model(members[0])
        match self._engine.vectorize:
            case "loop" | "vmap" as forced:
                return forced
            case "measure" if self._architecture(members[0]) in self._measured:
                return self._measured[self._architecture(members[0])]
            case _:
                strategy = self._strategy
                private_rows = int(self._rows[members].mean())
                # Who learns from nobody is to be compared with `local`, bit for bit.
                alone = strategy.learns_alone
                return choose_backend(
                    model if alone else strategy.architecture(members[0]),
                    input_shape=strategy.federation.shape_of(members[0]),
                    num_classes=self._num_classes,
                    members=len(members),
                    batch_rows=(
                        self._settings.clients.batch_size
                        if alone
                        else strategy.rows_of_step(private_rows)
                    ),
                    device="cuda" if self._engine.gpus_per_worker else "cpu",
                    objective=None if alone else strategy.composed(),
                )

    def _model(self, client: int) -> ModelSettings:
        return self._settings.model_of(client)

    def _architecture(self, client: int) -> str:
        return self._strategy.federation.architectures[client]

    def _by_architecture(self, clients: Iterable[int]) -> list[list[int]]:
        groups: dict[str, list[int]] = {}
        for client in clients:
            groups.setdefault(self._architecture(client), []).append(client)
        return list(groups.values())

    def _stacks(self, group: Sequence[int]) -> list[list[int]]:
        """Cut a group so that members of a stack have about as many rows: less is padded."""
        by_size = sorted(group, key=lambda client: (-self._rows[client], client))
        return [sorted(part) for part in _parts(by_size, self._engine.cohort_size)]


def _parts(clients: Sequence[int], size: int) -> list[list[int]]:
    return [list(clients[start : start + size]) for start in range(0, len(clients), size)]
