"""FedGKT: small models at the clients, a large one at the server that goes on from their features.

Source: He, Annavaram, Avestimehr, 2020, Algorithm 1. https://arxiv.org/abs/2007.14513
Clients and server learn from labels and from each other's logits of the clients' own rows. What
leaves a client is, of every private row, what one of its layers puts out, its logits AND ITS LABEL.

Differs from the authors' code: logits are known by the row they are of, not by their place in a
batch; the server's are those of the trained model in evaluation mode, unless ``returned: trained``;
teachers' probabilities are not raised by 1e-7. Clients whose features differ in shape have no
common server model: there is one for each shape.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import ClassVar, Literal

import numpy as np
import torch

from fedkd.bounds import Count, Temperature, Text
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import RowFeatures, RowLogits
from fedkd.exchange.values import Value
from fedkd.inputs import Shape
from fedkd.losses.reduction import PerRow
from fedkd.losses.response import soft_target_rows
from fedkd.models import ModelSettings, build_model
from fedkd.objectives.taps import PENULTIMATE, layer_shapes, resolved_layer
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule
from fedkd.targets import soften
from fedkd.training import (
    Batch,
    Cohort,
    Losses,
    ObjectiveFunction,
    OptimizerSettings,
    Outputs,
    Table,
    as_tensor,
    supervised,
)
from strategies.contract import (
    Call,
    Card,
    Fault,
    GivenRows,
    PrivateUse,
    Received,
    Round,
    ServerModel,
    ServerModelSettings,
    ServerTools,
    Step,
    Strategy,
    StrategySettings,
    Upload,
    payloads_of,
)

TAUGHT, KNOWN = "taught", "known"
"""What objectives call the other side's logits, one row for each of theirs, and which there are."""


class FedGKTSettings(StrategySettings):
    """Settings under ``strategy:`` when ``name: fedgkt``.

    Attributes:
        layer: whose output clients send and the server's model takes in: ``penultimate`` (what the
            last linear layer reads), ``last_map`` (the last feature maps) or a module path.
        model: the server's, on features; a vector counts as an image of one line.
        optimizer: of the server's model, which remembers from round to round; null: that of the
            clients.
        temperature: softens both sides' logits.
        kd_weight: weight of the server's logits in what a client minimises, beside cross-entropy
            of weight 1; a number or a schedule.
        server_ce_weight: weight of cross-entropy in what the server minimises, beside the clients'
            logits of weight 1; a number or a schedule.
        server_epochs: the server's passes over the rows of a round.
        returned: which logits go back: ``evaluated`` of the trained model in evaluation mode;
            ``trained`` as it put them out in its last pass, before each step, as in the authors'
            code.
    """

    name: Literal["fedgkt"] = "fedgkt"
    layer: Text = PENULTIMATE
    model: ModelSettings = ModelSettings(name="mlp")
    optimizer: OptimizerSettings | None = None
    temperature: Temperature = 3.0
    kd_weight: NonNegativeSchedule = ConstantSchedule(value=0.5)
    server_ce_weight: NonNegativeSchedule = ConstantSchedule(value=0.5)
    server_epochs: Count = 5
    returned: Literal["evaluated", "trained"] = "evaluated"


@dataclass(frozen=True)
class Server(Value):
    """What the server remembers.

    Attributes:
        models: its models, by the shape of the features that they take in.
        logits: what it last said about each client's rows.
    """

    models: Mapping[str, ServerModel]
    logits: Mapping[int, RowLogits] = field(default_factory=dict)


@lru_cache(maxsize=256)
def feature_shape(
    model: ModelSettings, layer: str, input_shape: Shape, num_classes: int
) -> tuple[int, ...]:
    """Return the shape of what a layer puts out for one row.

    Raises:
        ValueError: naming the setting, the layer and those that the model has.
    """
    module = build_model(model, input_shape=input_shape, num_classes=num_classes, seed=0)
    shapes = layer_shapes(module, torch.zeros(2, *input_shape))
    try:
        return shapes[resolved_layer(layer, shapes, whose=model.label)]
    except ValueError as error:
        raise ValueError(f"strategy.layer: {error}") from None


def as_image(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the shape of features as that of an image: up to three dimensions, the rest joined."""
    padded = (1,) * (3 - len(shape)) + shape
    return padded[0], padded[1], int(np.prod(padded[2:]))


def taught_and_labelled(
    outputs: Outputs, batch: Batch, *, kd_weight: float, ce_weight: float, temperature: float
) -> Losses:
    """Cross-entropy, and the divergence from the other side's logits where there are any."""
    assert outputs.private is not None  # noqa: S101
    taught = soften(batch.tables[TAUGHT], temperature=temperature)
    rows = soft_target_rows(outputs.private, taught, temperature=temperature)
    kd = PerRow(rows, of="private", weights=batch.tables[KNOWN])
    ce = supervised(outputs, batch, weight=ce_weight)
    return {**ce, "kd": (kd_weight * temperature**2) * kd}


FAULTS = {
    "batch_keyed": Fault(
        does="keeps the server's logits by their place in a batch, so that shuffled rows get "
        "another row's",
        read_in="FedML-AI/FedML, simulation/mpi/fedgkt, once its loader shuffles",
        right="logits are known by the row they are of",
    ),
}


class FedGKT(Strategy[FedGKTSettings, Server]):
    """Features, logits and labels up; the server's logits of the same rows down."""

    card = Card(
        learns="clients and the server's model from each other",
        up="n_k x (features + C logits + label)",
        down="n_k x C logits",
        equation=(
            "client: CE + kd_weight * T^2 KL(server || client); server: T^2 KL(client || "
            "server) + ce_weight * CE"
        ),
    )
    Settings: ClassVar[type[StrategySettings]] = FedGKTSettings
    State: ClassVar[type[Value]] = Server
    up = (RowFeatures,)
    down = (RowLogits,)
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def private_use(self) -> PrivateUse:
        """What is sent is of private rows."""
        return super().private_use._replace(
            sent="features, logits and labels of private rows",
        )

    @property
    def learns_alone(self) -> bool:
        """Whether what is received never counts."""
        return self.federation.never(self.settings.kd_weight)

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Learn from labels and from the server's logits; send what it is to learn from."""
        settings = self.settings
        weight = settings.kd_weight.at(call.progress)
        objective: ObjectiveFunction = supervised
        tables: dict[str, Table] = {}
        if received and weight:
            objective = partial(
                taught_and_labelled,
                kd_weight=weight,
                ce_weight=1.0,
                temperature=settings.temperature,
            )
            tables = self._tables(cohort, received, call)
        cohort.fit(objective, private=call.local, tables=tables)
        return [
            RowFeatures(
                rows=own.rows,
                features=own.features[settings.layer],
                logits=own.logits,
                labels=np.asarray(own.labels),
            )
            for own in cohort.outputs(on="private", layers=[settings.layer])
        ]

    def _tables(self, cohort: Cohort, received: Received, call: Call) -> dict[str, Table]:
        """Return the server's logits of each member's rows; none for who received none."""
        none = RowLogits(
            rows=np.empty(0, np.int64),
            values=np.empty((0, self.federation.num_classes), np.float32),
        )
        found = [
            (none if piece is None else expect(piece, RowLogits)).of(rows)
            for piece, rows in zip(received, cohort.private_rows, strict=True)
        ]
        if self.commits("batch_keyed"):
            orders = [
                call.random(client).permutation(len(values))
                for client, (values, _) in zip(cohort.clients, found, strict=True)
            ]
            found = [
                (values[order], known[order])
                for order, (values, known) in zip(orders, found, strict=True)
            ]
        return {
            TAUGHT: Table([values for values, _ in found], of="private"),
            KNOWN: Table([known.astype(np.float32) for _, known in found], of="private"),
        }

    # -- server half ---------------------------------------------------------------------

    def shape_of(self, client: int) -> tuple[int, ...]:
        """Return the shape of one row's features at a client."""
        federation = self.federation
        return feature_shape(
            federation.models[client],
            self.settings.layer,
            federation.input_shape,
            federation.num_classes,
        )

    def server_models(self) -> Mapping[str, ServerModelSettings]:
        """A model for each shape of features."""
        shapes = {self.shape_of(client) for client in range(self.federation.num_clients)}
        return {
            _name(shape): ServerModelSettings(
                self.settings.model, self.settings.optimizer, as_image(shape)
            )
            for shape in sorted(shapes)
        }

    def begin(self, server: ServerTools) -> Server:
        """Nothing was said yet."""
        return Server({name: server.new(name) for name in self.server_models()})

    def receives(self, state: Server, client: int, round: Round) -> int | None:
        """What the server last said about the client's rows."""
        return client if client in state.logits else None

    def payload(self, state: Server, key: int) -> RowLogits:
        """The logits for one client."""
        return state.logits[key]

    def asks(self, state: Server, client: int, round: Round, server: ServerTools) -> Asked:
        """Features, logits and labels of its private rows."""
        federation = self.federation
        rows = federation.num_examples[client]
        return RowFeatures.asked(rows, self.shape_of(client), federation.num_classes)

    def aggregate(
        self, state: Server, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Server:
        """Train each model on the rows that fit it, and say what it makes of them."""
        groups: dict[str, dict[int, RowFeatures]] = {}
        for upload, sent in payloads_of(uploads, RowFeatures):
            groups.setdefault(_name(self.shape_of(upload.client)), {})[upload.client] = sent
        models, logits = dict(state.models), dict(state.logits)
        for name, sent_by in groups.items():
            if not any(len(own.rows) for own in sent_by.values()):
                continue
            models[name], said = self._taught(models[name], list(sent_by.values()), round, server)
            for client, own in zip(sent_by, said, strict=True):
                logits[client] = own
        return Server(models, {client: logits[client] for client in sorted(logits)})

    def _taught(
        self, model: ServerModel, sent: Sequence[RowFeatures], round: Round, server: ServerTools
    ) -> tuple[ServerModel, list[RowLogits]]:
        """Return a model after it has learnt from all rows, and its logits of each client's."""
        settings = self.settings
        inputs = np.concatenate(
            [own.features.reshape(len(own.rows), *as_image(own.features.shape[1:])) for own in sent]
        )
        given = GivenRows(inputs, np.concatenate([own.labels for own in sent]))
        taught = np.concatenate([own.logits for own in sent])
        known = np.ones(len(taught), np.float32)
        trained = server.fit(
            model,
            partial(
                taught_and_labelled,
                kd_weight=1.0,
                ce_weight=settings.server_ce_weight.at(round.progress),
                temperature=settings.temperature,
            ),
            round=round,
            private=round.passes(settings.server_epochs),
            rows=given,
            tables={TAUGHT: Table(taught, of="private"), KNOWN: Table(known, of="private")},
            keep_outputs=settings.returned == "trained",
        )
        said = np.empty_like(taught)
        if trained.outputs is None:
            said[:] = server.predict(trained.model, as_tensor(inputs))
        else:
            last = slice(-len(said), None)
            said[trained.outputs.rows[last]] = trained.outputs.logits[last]
        parts = np.split(said, np.cumsum([len(own.rows) for own in sent])[:-1])
        answers = [
            RowLogits(rows=own.rows, values=part) for own, part in zip(sent, parts, strict=True)
        ]
        return trained.model, answers

    def smallest_steps(self) -> Iterator[Step]:
        """The server's models train on features of as many rows as the smallest client has."""
        yield from super().smallest_steps()
        rows = self.federation.round(1).passes(1).smallest(min(self.federation.num_examples))
        remedy = "a server model would; use a larger clients.batch_size or data.partition.min_rows"
        for settings in self.server_models().values():
            yield Step("strategy.model", settings.model, rows, remedy, settings.input_shape)


def _name(shape: tuple[int, ...]) -> str:
    return "features " + "x".join(map(str, shape))
