"""`doctor`: how well a public set would serve, seen before anything is exchanged."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from fedkd.data import FederatedData
from fedkd.exchange.adversaries import NoAdversary
from fedkd.metrics.arrays import log_softmax
from fedkd.metrics.forecast import COVERAGE, Forecast
from fedkd.metrics.public_set import (
    PublicSetFigures,
    confident_rows,
    covered_classes,
    domain_shift,
    figures_of,
)
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose, generator_for
from sim.attacks.bench import Bench
from sim.commands.running import load_data
from sim.devices.clock import ClockSettings
from sim.devices.presence import PresenceSettings
from sim.engine.inline import InlineGrid
from sim.engine.runtime import build_strategy, federation_of, has_ensemble
from sim.keeping.exchange import clients_models
from sim.reports.tables import points
from sim.reports.terminal import NOTHING, Column, FittedTable
from sim.server.observers import Observer, Row
from sim.server.rounds import RoundLoop
from sim.settings import Settings, SettingsError
from sim.settings.schema import CounterfactualSettings, ExchangeSettings, PrivacySettings
from strategies import strategy_class

EPOCHS = 4
"""Passes over its private rows that a client learns for before it is asked."""

MOST_CLIENTS = 20
"""Clients that learn and answer, where there are more of them."""

FORECAST_FILE = "doctor_forecast.json"

FEW_ROWS = 5
"""With fewer public rows for a class there is little to average over."""

TOLD_APART = 0.9
"""Above this area under the curve, hardly any public row could be a private one."""

OTHER_MIX = 0.3
"""Above this distance, public rows seem to hold the classes in another mix."""

UNDECIDED = 0.9
"""Above this share of ln(classes), answers are hardly more than a guess."""


BEYOND = 0.1
"""Of the range of a figure, how far outside of it a forecast is still no guess."""


class Expected(NamedTuple):
    """What an algorithm is expected to gain over learning alone, in accuracy, and the interval."""

    gain: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Examination:
    """What a few local epochs show of a public set.

    Attributes:
        figures: of rows and answers.
        confident: by class, public rows that the clients' mean gives it and some client is sure of.
        private: by class, private rows of all clients.
        public_rows: how many there are.
        clients: that learnt and answered.
        public_accuracy: of the ensemble on public rows; None unless public labels are allowed.
    """

    figures: PublicSetFigures
    confident: np.ndarray
    private: np.ndarray
    public_rows: int
    clients: int
    public_accuracy: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """What the doctor says of a configuration.

    Attributes:
        name: of the configuration.
        strategy: that would exchange predictions.
        epochs: that clients learnt for.
        classes: their names.
        seen: what was examined.
        expected: by algorithm.
        forecast: what the forecast was made from, and what it was worth.
        advice: what to do, most urgent first.
        notes: what the figures do not know of.
    """

    name: str
    strategy: str
    epochs: int
    classes: tuple[str, ...]
    seen: Examination
    expected: Mapping[str, Expected]
    forecast: Mapping[str, Any]
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    def to_row(self) -> Row:
        """Return it as plain values; accuracies and shares are in [0, 1]."""
        seen = self.seen
        return {
            "name": self.name,
            "strategy": self.strategy,
            "epochs": self.epochs,
            "clients": seen.clients,
            "public_rows": seen.public_rows,
            "figures": {**asdict(seen.figures), "ensemble_gain": seen.figures.ensemble_gain},
            "public_accuracy": seen.public_accuracy,
            "classes": [
                {"class": name, "private_rows": int(private), "confident_rows": int(sure)}
                for name, private, sure in zip(
                    self.classes, seen.private, seen.confident, strict=True
                )
            ],
            "expected": {name: own._asdict() for name, own in self.expected.items()},
            "forecast": dict(self.forecast),
            "advice": list(self.advice),
            "notes": list(self.notes),
        }

    def table(self) -> FittedTable:
        """Return the figures, one a line."""
        lines = list(self._lines())
        return FittedTable(
            label="figure",
            labels=[label for label, _, _ in lines],
            columns=[
                Column(title="value", cells=[value for _, value, _ in lines], rank=1),
                Column(title="best", cells=[best for _, _, best in lines], rank=2),
            ],
            title=f"{self.name}: {self.seen.public_rows} public rows, {self.seen.clients} clients "
            f"after {self.epochs} local epoch{'s' * (self.epochs != 1)}",
        )

    def _lines(self) -> Iterator[tuple[str, str, str]]:
        own, share = self.seen.figures, _percent
        yield "public rows for each class", f"{own.rows_per_class:.1f}", "many"
        yield "told apart from private rows", _number(own.domain_auc), "0.50"
        yield "overlap with private rows", share(own.overlap), "100 %"
        yield "entropy of a client's answers", share(own.answer_entropy), "low"
        yield "diversity of answers", share(own.diversity), "some"
        yield "pairs that disagree", share(own.disagreement), "some"
        yield "classes covered", share(own.coverage), "100 %"
        yield "other mix of classes", share(own.mix_distance), "0 %"
        yield "mean client, validation", share(own.client_accuracy), ""
        yield "ensemble, validation", share(own.ensemble_accuracy), "above"
        if self.seen.public_accuracy is not None:
            yield "ensemble, public labels", share(self.seen.public_accuracy), "high"

    def sentences(self) -> list[str]:
        """Return the forecast and what to do, in words."""
        told = [
            f"{name}: mean client expected {points(own.gain)} points above learning alone "
            f"({100 * COVERAGE:.0f} % interval {points(own.low)} to {points(own.high)})"
            for name, own in self.expected.items()
        ]
        told += self.forecast["verdict"]
        advice = [f"- {each}" for each in self.advice] or ["- nothing to mend stands out"]
        return [*told, "", *advice, *self.notes]


def _percent(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{100 * value:.0f} %"


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.2f}"


def doctor(
    settings: Settings | None = None,
    *,
    epochs: int = EPOCHS,
    observers: Sequence[Observer] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Checkup:
    """Say how well a run's public set would serve, and what gain to expect; write nothing.

    Args:
        settings: of the run; the digits default if None.
        epochs: that clients learn alone for before they are asked.
        observers: told about every epoch while it happens.
        tell: told what is done after them.

    Raises:
        SettingsError: names the setting that cannot work, such as an algorithm whose clients send
            no predictions of public rows.
    """
    settings = settings or Settings()
    if not 1 <= epochs <= 1000:
        raise SettingsError(f"--epochs must be from 1 to 1000, got {epochs}")
    data = load_data(settings)
    _check_exchanges(settings, data)
    seen = examine(settings, data, epochs=epochs, observers=observers, tell=tell)
    about = _forecast_file()["about"]
    return Checkup(
        name=settings.name,
        strategy=settings.strategy.name,
        epochs=epochs,
        classes=data.class_names[: len(seen.private)],
        seen=seen,
        expected=expected_gains(seen.figures),
        forecast=about,
        advice=tuple(_advice(seen, data)),
        notes=(*_notes(settings, data), *_beyond(settings, seen.figures, about)),
    )


def _check_exchanges(settings: Settings, data: FederatedData) -> None:
    strategy = build_strategy(settings, federation_of(settings, data))
    if data.views:
        raise SettingsError(
            "data.views: the doctor looks at one public set, and each view has its own; leave "
            "data.views out"
        )
    if not has_ensemble(strategy, data) or not len(data.public_inputs):
        raise SettingsError(
            f"strategy.name: in {settings.strategy.name!r}, as it is set up, clients send no "
            "predictions of public rows, and a public set is all that the doctor looks at; with "
            "strategy.name=dml or fedmd they do ('fedkd algorithms' says what travels)"
        )


def examine(
    settings: Settings,
    data: FederatedData,
    *,
    epochs: int = EPOCHS,
    observers: Sequence[Observer] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Examination:
    """Let clients learn alone, and look at what they answer.

    Args:
        settings: of the run.
        data: of the run.
        epochs: passes over private rows.
        observers: told about every epoch.
        tell: told what is done after them.

    Raises:
        AuthorError: a model's own code is wrong.
        QuorumError: too few clients could learn.
    """
    alone = _alone(settings, epochs)
    grid = InlineGrid(alone, data)
    loop = RoundLoop(grid, alone, data, observers)
    loop.run()
    weights = clients_models(loop, grid)
    tell("answers on public rows")
    num_classes = data.num_classes - data.other_classes
    bench = Bench(data, alone.clients.optimizer, alone.seed)
    public, held = (
        _answers(bench, settings, weights, inputs, num_classes)
        for inputs in (data.public_inputs, data.validation_inputs)
    )
    tell("public beside private rows")
    rng = generator_for(settings.seed, Purpose.EVALUATION)
    private = np.concatenate(data.client_rows)
    shift = domain_shift(
        _columns(data, data.train_inputs[private]), _columns(data, data.public_inputs), rng
    )
    labels = data.public_labels
    known = None if labels is None else labels < num_classes
    return Examination(
        figures=figures_of(public, held, data.validation_labels, shift),
        confident=confident_rows(public),
        private=data.label_counts().sum(axis=0)[:num_classes],
        public_rows=len(data.public_inputs),
        clients=len(weights),
        public_accuracy=None
        if labels is None or known is None or not known.any()
        else float((public.mean(axis=0).argmax(axis=1) == labels)[known].mean()),
    )


def _alone(settings: Settings, epochs: int) -> Settings:
    """Return settings in which clients learn alone, in this process, for an epoch a round."""
    clients = settings.clients
    return settings.model_copy(
        update={
            "rounds": epochs,
            "clients": clients.model_copy(
                update={
                    "participation": 1.0,
                    "participants": MOST_CLIENTS if clients.count > MOST_CLIENTS else None,
                    "local": clients.local.model_copy(update={"epochs": 1, "steps": None}),
                }
            ),
            "strategy": strategy_class("local").Settings(name="local"),
            "exchange": ExchangeSettings(),
            "privacy": PrivacySettings(),
            "adversary": NoAdversary(),
            "counterfactual": CounterfactualSettings(),
            "clock": ClockSettings(),
            "presence": PresenceSettings(),
            "faults": (),
            "engine": settings.engine.model_copy(update={"backend": "inline", "address": None}),
            "evaluation": settings.evaluation.model_copy(update={"every": epochs, "clients": 1}),
        }
    )


def _answers(
    bench: Bench,
    settings: Settings,
    weights: Mapping[int, Mapping[str, np.ndarray]],
    inputs: Float[np.ndarray, "rows *shape"],
    num_classes: int,
) -> Float[np.ndarray, "clients rows classes"]:
    """Return the probabilities of private classes that clients give, in their order."""
    found: dict[int, np.ndarray] = {}
    by_model: dict[ModelSettings, list[int]] = {}
    for client in weights:
        by_model.setdefault(settings.model_of(client), []).append(client)
    for model, clients in by_model.items():
        logits = bench.predict(model, [weights[client] for client in clients], inputs)
        found |= dict(zip(clients, np.exp(log_softmax(logits[..., :num_classes])), strict=True))
    return np.stack([found[client] for client in sorted(found)])


def _columns(
    data: FederatedData, inputs: Float[np.ndarray, "rows *shape"]
) -> Float[np.ndarray, "rows features"]:
    """Return inputs as numbers of which means say something: of texts, how often a token occurs."""
    if data.vocabulary is None:
        return inputs.reshape(len(inputs), -1)
    tokens = inputs.reshape(len(inputs), -1).astype(np.int64)
    counts = np.zeros((len(tokens), data.vocabulary))
    np.add.at(counts, (np.arange(len(tokens))[:, None], tokens), 1.0)
    return counts


# -- the forecast ------------------------------------------------------------------------------


def features_of(figures: PublicSetFigures) -> dict[str, float]:
    """Return what the forecast knows of a public set; what is not known counts as harmless."""
    shift = 0.0 if math.isnan(figures.domain_auc) else max(2 * figures.domain_auc - 1, 0.0)
    disagreement = 0.0 if math.isnan(figures.disagreement) else figures.disagreement
    return {
        "ensemble_gain": figures.ensemble_gain,
        "client_accuracy": figures.client_accuracy,
        "domain_shift": shift,
        "gain_in_own_domain": figures.ensemble_gain * (1 - shift),
        "answer_entropy": figures.answer_entropy,
        "diversity": figures.diversity,
        "disagreement": disagreement,
        "log_rows_per_class": math.log(figures.rows_per_class),
        "coverage": figures.coverage,
        "mix_distance": figures.mix_distance,
    }


def expected_gains(figures: PublicSetFigures) -> dict[str, Expected]:
    """Return what each algorithm that the forecast was made of is expected to gain."""
    features = [*features_of(figures).values()]
    found = {}
    for name, row in _forecast_file()["algorithms"].items():
        forecast = Forecast.of_row(row)
        gain = float(np.clip(forecast.at(features), -1, 1))
        width = forecast.half_width
        found[name] = Expected(gain, max(gain - width, -1.0), min(gain + width, 1.0))
    return found


@cache
def _forecast_file() -> dict[str, dict[str, Any]]:
    text = (files("sim.commands") / FORECAST_FILE).read_text(encoding="utf-8")
    made: dict[str, dict[str, Any]] = json.loads(text)
    return made


# -- what to do --------------------------------------------------------------------------------


def _advice(seen: Examination, data: FederatedData) -> Iterator[str]:
    """Name what would make the public set better, most urgent first."""
    own, names = seen.figures, data.class_names
    if own.domain_auc > TOLD_APART:
        yield (
            "wrong domain: public rows are told from private ones in "
            f"{_percent(own.domain_auc)} of pairs; take rows that look like the clients' "
            "(data.public.source)"
        )
    if own.rows_per_class < FEW_ROWS:
        enough = FEW_ROWS * len(seen.private)
        yield (
            f"too few rows: {own.rows_per_class:.1f} for each class; data.public.size={enough} "
            f"has {FEW_ROWS}"
        )
    nobody = np.flatnonzero(seen.private == 0).tolist()
    if nobody:
        yield f"no client holds {_named(names, nobody)}: nobody can teach it"
    covered = set(covered_classes(seen.confident).tolist())
    bare = [c for c in np.flatnonzero(seen.private).tolist() if c not in covered]
    if bare:
        yield (
            f"not covered: hardly any public row is surely {_named(names, bare)}; such rows in the "
            "public set, or more training before they are asked, would help"
        )
    if own.mix_distance > OTHER_MIX:
        yield (
            "wrong classes: answers on public and on validation rows differ by "
            f"{_percent(own.mix_distance)} in their mix of classes; are the public rows of these?"
        )
    if own.answer_entropy > UNDECIDED:
        yield (
            f"undecided: answers have {_percent(own.answer_entropy)} of the entropy of a guess; "
            "train longer before they are exchanged (clients.local.epochs)"
        )
    if own.ensemble_gain <= 0:
        yield (
            "nothing to share: the clients' mean answer is no better than a single client on "
            "validation rows"
        )


def _named(names: Sequence[str], classes: Sequence[int]) -> str:
    told = [names[place] for place in classes[:8]]
    more = f" and {len(classes) - 8} more" if len(classes) > 8 else ""
    return f"class{'es' if len(classes) > 1 else ''} {', '.join(told)}{more}"


def _notes(settings: Settings, data: FederatedData) -> Iterator[str]:
    """Name what the run has and the figures know nothing of."""
    if settings.privacy.on:
        yield "privacy.mechanism: answers were taken without its noise."
    if not isinstance(settings.adversary, NoAdversary):
        yield "adversary: answers were taken as if everybody were honest."
    if settings.exchange.up.kind != "float32":
        yield "exchange: answers were taken as they are before any codec."
    if data.public_labels is not None:
        yield "data.public.labelled: public labels were compared with the ensemble's answers."


def _beyond(
    settings: Settings, figures: PublicSetFigures, about: Mapping[str, Any]
) -> Iterator[str]:
    """Say where the forecast was made from other federations than this one."""
    yield (
        f"The forecast is of {about['rounds']} rounds of {about['local_epochs']} local epochs with "
        f"small models; {_training(settings)}."
    )
    outside = [
        f"{name} {value:.3g} (there {low:.3g} to {high:.3g})"
        for (name, value), low, high in zip(
            features_of(figures).items(), about["lowest"], about["highest"], strict=True
        )
        if abs(value - (low + high) / 2) > (0.5 + BEYOND) * (high - low)
    ]
    if outside:
        yield f"It has seen no federation with {', '.join(outside)}: trust it less."


def _training(settings: Settings) -> str:
    local = settings.clients.local
    count, what = (local.epochs, "epoch") if local.steps is None else (local.steps, "step")
    how = f"{count} local {what}{'s' * (count != 1)}"
    return f"this run has {settings.rounds} rounds of {how}"
