"""FedGen: a generator of features, taught by all clients' last layers, teaches every client.

Source: Zhu, Hong, Zhou, 2021, Data-Free Knowledge Distillation for Heterogeneous Federated
Learning, Algorithm 1. https://arxiv.org/abs/2105.10056
FedAvg whose server also trains a generator: from a label and noise it makes what a model's last
layer might read of a row of that class, as the clients' last layers see it, those counting most
that hold most rows of the class. Clients train their last layers on what it makes, and are drawn
towards what these say about it (``latent_weight``, by the published code). Round 1 has none.

Differs from the published code: noise is Gaussian, as in the paper, where the code draws it evenly
from 0 to 1. Label counts are those of a client's rows, and none is added where it holds none.
Features are drawn anew in every round and not in every step, one for each private row, and teach in
every local epoch. A class that no participant holds twice is not generated and teaches nobody.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from fedkd.bounds import Count, Share, Weight, Whole
from fedkd.exchange.payload import Asked, Payload, expect
from fedkd.exchange.payloads import Bundle, Numbers, Weights
from fedkd.exchange.values import Value
from fedkd.exchange.views import RunningMean
from fedkd.inputs import Shape
from fedkd.losses.reduction import PerRow
from fedkd.losses.response import hard_label_rows, soft_target_rows
from fedkd.models import ModelSettings, build_model
from fedkd.objectives.taps import head_layer
from fedkd.training import (
    MODEL,
    Arrays,
    Batch,
    Cohort,
    Losses,
    OptimizerSettings,
    Outputs,
    Table,
    supervised,
)
from strategies.baselines.fedavg import Averaging, AveragingSettings, GlobalModels
from strategies.contract import (
    Call,
    Card,
    Fault,
    PrivateUse,
    Received,
    Round,
    ServerTools,
    StrategySettings,
    Upload,
    payloads_of,
)
from strategies.shared.features import feature_widths
from strategies.shared.generator import (
    OUT,
    GeneratorShape,
    Teacher,
    generated,
    generator_weights,
    known_labels,
    taught,
)
from strategies.shared.means import received_part

GENERATOR, LABELS, COUNTS, HEAD = "generator", "labels", "counts", "head"
"""What travels beside weights: the generator and the classes that it knows, clients' label counts;
and what the shared weights are called where only last layers travel."""

SMALLEST = 1e-4
"""Weights of what is generated fall no further."""


class FedGenSettings(AveragingSettings):
    """Settings under ``strategy:`` when ``name: fedgen``.

    Attributes:
        share: ``model`` averages all parameters, as the paper does; ``head`` the last layers alone.
        teacher: how last layers teach the generator. ``losses``: by their losses, weighted by label
            counts, as in the code; ``logits``: by the mean of their logits, as in the paper;
            ``weighted_logits``: by that of logits weighted by label counts.
        teacher_weight: of what they say, alpha in the code.
        diversity_weight: of the term that keeps features of one class apart, eta in the code.
        label_weight: of last layers' cross-entropy on what is generated, before its first decay.
        latent_weight: of the divergence from what a last layer says about what is generated for a
            row's class, before its first decay; 0 leaves it out.
        weight_decay: factor on both from round to round.
        generator_optimizer: of the generator.
        generator_decay: factor on its learning rate from round to round.
        generator_steps: that it takes in a round.
        generator_batch: features in each of them.
        noise: numbers that are drawn for each.
        hidden: width of the generator.
    """

    name: Literal["fedgen"] = "fedgen"
    share: Literal["model", "head"] = "model"
    teacher: Teacher = "losses"
    teacher_weight: Weight = 1.0
    diversity_weight: Weight = 1.0
    label_weight: Weight = 10.0
    latent_weight: Weight = 10.0
    weight_decay: Share = 0.98
    generator_optimizer: OptimizerSettings = OptimizerSettings(lr=3e-4, weight_decay=1e-2)
    generator_decay: Share = 0.98
    generator_steps: Count = 50
    generator_batch: Whole = Field(128, ge=2, le=100_000)
    noise: Count = 32
    hidden: Count = 256

    @field_validator("generator_optimizer")
    @classmethod
    def _keeps_its_rate_in_a_round(cls, optimizer: OptimizerSettings) -> OptimizerSettings:
        if not optimizer.constant:
            raise ValueError(
                "strategy.generator_optimizer must have a constant rate, got warm_up "
                f"{optimizer.warm_up} and decay {optimizer.decay}; strategy.generator_decay "
                "changes the rate from round to round"
            )
        return optimizer


@dataclass(frozen=True)
class Generating(GlobalModels):
    """What the server remembers.

    Attributes:
        head: the last layer that all share, where they share no more than that.
        generator: its weights and what its optimizer remembers; none before it was trained.
        labels: classes that it was last trained to generate.
    """

    head: Mapping[str, np.ndarray] = field(default_factory=dict)
    generator: Mapping[str, np.ndarray] = field(default_factory=dict)
    labels: tuple[int, ...] = ()


def weight_at(first: float, decay: float, round: int) -> float:
    """Return ``first * decay^t``, t rounds after the first one, but for 0 at least `SMALLEST`."""
    return max(first * decay ** (round - 1), SMALLEST) if first else 0.0


def towards_generated(
    outputs: Outputs, batch: Batch, *, label_weight: float, latent_weight: float
) -> Losses:
    """Return cross-entropy on private rows, and what generated features teach beside them."""
    losses = dict(supervised(outputs, batch))
    tables, own = batch.tables, outputs.private
    assert own is not None  # noqa: S101 (supervised has looked)
    if label_weight:
        logits = outputs.head(tables["drawn"])
        rows = hard_label_rows(logits, tables["drawn labels"])
        losses["generated"] = label_weight * PerRow(rows, of="private")
    if latent_weight:
        target = outputs.head(tables["same"]).detach().softmax(-1)
        rows = soft_target_rows(own, target, temperature=1.0)
        known = PerRow(rows, of="private", weights=tables["known"])
        losses["latent"] = latent_weight * known
    return losses


FAULTS = {
    "uniform_noise": Fault(
        does="draws the generator's noise evenly from [0, 1)",
        read_in="zhuangdizhu/FedGen, FLAlgorithms/trainmodel/generator.py: torch.rand",
        right="Gaussian noise, as the paper and the code's own comment say",
    ),
}


class FedGen(Averaging[FedGenSettings, Generating]):
    """Weights and a generator down, training beside generated features, weights and counts up."""

    card = Card(
        learns="the server's generator from the clients' last layers, clients from the generator",
        up="P, C label counts; with heads only C (d + 1) for P",
        down="P, and from round 2 on the generator and C flags",
        equation=(
            "generator: sum_k w_ky CE(head_k(G(y, e)), y) + exp(-mean |e-e'|^2 |z-z'|); client: CE "
            "+ a CE(head(G(y~)), y~) + b KL(head(G(y)) || own)"
        ),
        needs=("clients.models=mlp",),
    )
    Settings: ClassVar[type[StrategySettings]] = FedGenSettings
    State: ClassVar[type[Value]] = Generating
    up = (Bundle,)
    down = (Weights, Bundle)
    faults: ClassVar[Mapping[str, Fault]] = FAULTS

    @property
    def sums(self) -> None:
        """Each client's last layer teaches by itself."""
        return None

    @property
    def private_use(self) -> PrivateUse:
        """Counts are those of private rows."""
        return super().private_use._replace(
            sent="how many private rows of each class there are",
        )

    def check(self, input_shape: Shape) -> None:
        """Refuse models of different widths, and those whose last layer cannot be told apart."""
        super().check(input_shape)
        widths = feature_widths(self.federation, input_shape)
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{model} has {width}" for model, width in widths.items())
            raise ValueError(
                "clients.models: fedgen generates what last layers read, which must have one "
                f"width, got {told}: try clients.models=mlp"
            )
        heads = {model: self._head_of(model) for model in dict.fromkeys(self.federation.models)}
        if self.settings.share == HEAD and len({biased for _, biased in heads.values()}) > 1:
            told = ", ".join(
                f"{model.label} has {'one' if biased else 'none'}"
                for model, (_, biased) in heads.items()
            )
            raise ValueError(
                "strategy.share: head averages the last layers of all models, which must all have "
                f"a bias or none, but {told}: use strategy.share=model, or models that are alike"
            )

    def _path(self, client: int) -> str:
        """Return the module path of the last layer of a client's model."""
        return self._head_of(self.federation.models[client])[0]

    def _head_of(self, model: ModelSettings) -> tuple[str, bool]:
        return _head_of(model, self.federation.input_shape, self.federation.num_classes)

    def _shape(self, features: int) -> GeneratorShape:
        return GeneratorShape(
            classes=self.federation.num_classes,
            noise=self.settings.noise,
            hidden=self.settings.hidden,
            features=features,
        )

    # -- weights that travel -------------------------------------------------------------

    def _key(self, client: int) -> str:
        """Return whose weights have a common mean with a client's."""
        return HEAD if self.settings.share == HEAD else self.federation.architectures[client]

    def _head(self, weights: Mapping[str, np.ndarray], client: int) -> Arrays:
        """Return the last layer in a client's weights: ``weight`` and, if it has one, ``bias``."""
        path = self._path(client)
        found = {name: weights.get(f"{path}.{name}") for name in ("weight", "bias")}
        return {name: array for name, array in found.items() if array is not None}

    def _shared(self, weights: Mapping[str, np.ndarray], client: int) -> Weights:
        shares_head = self.settings.share == HEAD
        return Weights(arrays=self._head(weights, client) if shares_head else weights)

    def before_evaluation(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Judge the client's model with the weights that all share."""
        arrays = [own.arrays for own in received_part(received, MODEL).all(Weights)]
        if self.settings.share == HEAD:
            arrays = [
                {**own, **{f"{self._path(client)}.{name}": a for name, a in head.items()}}
                for client, own, head in zip(cohort.clients, cohort.weights(), arrays, strict=True)
            ]
        cohort.load_weights(arrays[0] if len(set(map(id, arrays))) == 1 else arrays)

    # -- client half ---------------------------------------------------------------------

    def client(self, cohort: Cohort, received: Received, call: Call) -> Sequence[Payload]:
        """Start from the shared weights, train, and send weights and label counts."""
        answers = []
        for client, sent, labels in zip(
            cohort.clients, super().client(cohort, received, call), _labels(cohort), strict=True
        ):
            shared = self._shared(expect(sent, Weights).arrays, client)
            counts = np.bincount(labels, minlength=self.federation.num_classes)
            numbers = Numbers(values=counts.astype(np.float32))
            answers.append(Bundle(parts={MODEL: shared, COUNTS: numbers}))
        return answers

    def learn(self, cohort: Cohort, received: Received, call: Call) -> None:
        """Train on private rows, beside generated features once there is a generator."""
        piece, settings = received[0], self.settings
        decay, number = settings.weight_decay, call.number
        label_weight = weight_at(settings.label_weight, decay, number)
        latent_weight = weight_at(settings.latent_weight, decay, number)
        if not isinstance(piece, Bundle) or not (label_weight or latent_weight):
            cohort.fit(supervised, private=call.local)
            return
        known = expect(piece[LABELS], Numbers).values > 0
        generator = expect(piece[GENERATOR], Weights).arrays
        shape = self._shape(len(generator[OUT]))
        labels = _labels(cohort)
        rngs = [call.random(client) for client in cohort.clients]
        drawn = [
            rng.choice(np.flatnonzero(known), len(own))
            for rng, own in zip(rngs, labels, strict=True)
        ]
        made = partial(generated, uniform_noise=self.commits("uniform_noise"))
        tables = {
            "drawn labels": Table(drawn, of="private"),
            "drawn": Table(made(shape, generator, drawn, rngs), of="private"),
            "same": Table(made(shape, generator, labels, rngs), of="private"),
            "known": Table([known[own].astype(np.float32) for own in labels], of="private"),
        }
        objective = partial(
            towards_generated, label_weight=label_weight, latent_weight=latent_weight
        )
        cohort.fit(objective, private=call.local, tables=tables, heads=True)

    # -- server half ---------------------------------------------------------------------

    def begin(self, server: ServerTools) -> Generating:
        """Start those who share weights from the first weights of the first of them."""
        models = {
            self._key(client): self._shared(server.initial_weights(client), client)
            for client in reversed(self.federation.first_clients.values())
        }
        return _remembered(models, Generating(models={}))

    def receives(self, state: Generating, client: int, round: Round) -> Hashable:
        """The weights that the client shares, and the generator once there is one."""
        return (self._key(client), bool(state.labels))

    def payload(self, state: Generating, key: Any) -> Payload:
        """Shared weights, alone or beside the generator and the classes that it knows."""
        shared, with_generator = key
        if not with_generator:
            return _known(state)[shared]
        known = np.zeros(self.federation.num_classes, np.float32)
        known[list(state.labels)] = 1.0
        return Bundle(
            parts={
                MODEL: _known(state)[shared],
                GENERATOR: Weights(arrays=generator_weights(state.generator)),
                LABELS: Numbers(values=known),
            }
        )

    def asks(self, state: Generating, client: int, round: Round, server: ServerTools) -> Asked:
        """Weights, and how many rows of each class the client holds."""
        shared = _known(state)[self._key(client)].arrays
        classes, rows = self.federation.num_classes, self.federation.num_examples[client]
        counts = Numbers.asked(classes, largest=float(rows), subject="a label count")
        return Bundle.asked(**{MODEL: Weights.asked(shared), COUNTS: counts})

    def aggregate(
        self, state: Generating, uploads: Iterable[Upload], round: Round, server: ServerTools
    ) -> Generating:
        """Average weights, and train the generator on the last layers that came."""
        means: dict[str, RunningMean[Weights]] = {}
        heads, counts = [], []
        for upload, sent in payloads_of(uploads, Bundle):
            model = expect(sent[MODEL], Weights)
            mean = means.setdefault(self._key(upload.client), RunningMean())
            mean.add(model, upload.weight(self.settings.weighting))
            shares_head = self.settings.share == HEAD
            head = model.arrays if shares_head else self._head(model.arrays, upload.client)
            heads.append((head["weight"], head.get("bias")))
            counts.append(expect(sent[COUNTS], Numbers).values)
        after = _remembered({key: mean.mean() for key, mean in means.items()}, state)
        if not heads or not len(known_labels(np.stack(counts))):
            return after
        settings = self.settings
        shape = self._shape(heads[0][0].shape[1])
        optimizer = settings.generator_optimizer
        rate = optimizer.lr * settings.generator_decay ** (round.number - 1)
        generator = taught(
            shape,
            state.generator or shape.first(self.federation.seed),
            heads,
            np.stack(counts),
            optimizer=optimizer.model_copy(update={"lr": rate}),
            steps=settings.generator_steps,
            batch=settings.generator_batch,
            teacher=settings.teacher,
            teacher_weight=settings.teacher_weight,
            diversity_weight=settings.diversity_weight,
            rng=round.random(),
            uniform_noise=self.commits("uniform_noise"),
        )
        labels = tuple(int(label) for label in known_labels(np.stack(counts)))
        return replace(after, generator=generator, labels=labels)


def _known(state: Generating) -> dict[str, Weights]:
    """Return all weights that are shared, by whose they are."""
    return {**state.models, **({HEAD: Weights(arrays=state.head)} if state.head else {})}


def _remembered(models: Mapping[str, Weights], state: Generating) -> Generating:
    """Return the state with newer weights. A last layer is no model, and is kept as arrays."""
    head = models[HEAD].arrays if HEAD in models else state.head
    own = {key: model for key, model in models.items() if key != HEAD}
    return replace(state, models={**state.models, **own}, head=head)


@lru_cache(maxsize=256)
def _head_of(model: ModelSettings, input_shape: Shape, num_classes: int) -> tuple[str, bool]:
    """Return the module path of a model's last layer, and whether that has a bias."""
    module = build_model(model, input_shape=input_shape, num_classes=num_classes, seed=0)
    path = head_layer(module, torch.zeros(2, *input_shape), whose=model.label)
    return path, f"{path}.bias" in module.state_dict()


def _labels(cohort: Cohort) -> list[np.ndarray]:
    """Return each member's labels, in the order of its rows."""
    labels = [own.labels for own in cohort.examples(on="private")]
    return [own for own in labels if own is not None]
