"""Whether promises of privacy hold: epsilons, the noise that is added, what one client can change.

P1: epsilons of Gaussian releases against the closed form in 50 digits, 50 cells. P2: 30 cells of
DP-SGD: what is reported may not be above Opacus' PRV accountant, which rounds up by about 0.01, and
not below it by more than 0.02; nor above Renyi's bound. Without Opacus the first half is left out,
and says so. P3: standard deviation of the noise that is found in what was released, over what it
should be, 10^6 numbers each, with up to half of the answers lost. P4: pairs of neighbours, random
and adversarial, whose difference may not be above the sensitivity by which noise is scaled.

    python benchmarks/privacy.py            # about three minutes
    python benchmarks/privacy.py --check    # exit status 1 where a target is missed
    python benchmarks/privacy.py --quick    # tiny, to see that it runs; says nothing
"""

import argparse
import importlib
import itertools
import json
import math
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator

import mpmath
import numpy as np
import torch
from measurement import describe, machine, row
from scipy.stats import norm

from fedkd.exchange.mechanisms import GaussianRelease, LaplaceRelease, RandomizedAnswers, Votes
from fedkd.exchange.mechanisms.sensitivity import bounded, form_of_payload, sensitivity
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import ClassTable, Predictions, Prototypes
from fedkd.exchange.pipeline import ClientTurn, ExchangeState, ServerTurn, Stages, Standing
from fedkd.exchange.release import Form, Occasion
from fedkd.exchange.views import Upload
from fedkd.models import ModelSettings
from fedkd.privacy import Gaussian, RandomizedResponse, SampledGaussian, spent
from fedkd.training import (
    Member,
    ModelPool,
    OptimizerSettings,
    Passes,
    PrivateLearning,
    Streams,
    TrainingData,
    open_cohort,
    supervised,
)

CLIENTS, CLASSES = 10, 10
WILD = (0.0, 1.0, -1.0, 1e-30, 3e38, -3e38, math.inf, -math.inf, math.nan, 0.5)


# -- P1, P2: epsilons ----------------------------------------------------------------------------


def closed_form(noise: float, count: int, delta: float) -> float:
    """Return epsilon of Gaussian releases: Balle and Wang, 2018, theorem 8, in 50 digits."""
    with mpmath.workdps(50):
        mu = mpmath.sqrt(count) / mpmath.mpf(noise)

        def over(epsilon: mpmath.mpf) -> mpmath.mpf:
            below = mpmath.ncdf(mu / 2 - epsilon / mu)
            return below - mpmath.exp(epsilon) * mpmath.ncdf(-mu / 2 - epsilon / mu) - delta

        low, high = mpmath.mpf(0), mu**2 / 2 + mu * mpmath.sqrt(-2 * mpmath.log(delta))
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if over(middle) > 0 else (low, middle)
        return float(high)


def gaussian_cells(quick: bool) -> float:
    cells = list(itertools.product((1.0, 3.0, 8.0, 20.0, 60.0), (1, 5, 20, 50, 200), (1e-5, 1e-7)))[
        : 4 if quick else None
    ]
    return max(
        abs(spent([Gaussian(count, noise)], delta=delta).epsilon - closed_form(noise, count, delta))
        for noise, count, delta in cells
    )


def prv_epsilon(noise: float, rate: float, steps: int, delta: float) -> float | None:
    """Return what Opacus says; None where it is not there."""
    try:
        accountants = importlib.import_module("opacus.accountants")
    except ImportError:
        return None
    accountant = accountants.PRVAccountant()
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta))


def sampled_cells(quick: bool) -> tuple[int, int, list[float]]:
    """Return how many cells are above Renyi's bound, of how many, and how far PRV is above each."""
    cells = list(itertools.product((0.8, 1.0, 1.5, 2.5, 4.0), (0.01, 0.05, 0.1), (100, 500)))
    cells = cells[: 2 if quick else None]
    over, apart = 0, []
    for noise, rate, steps in cells:
        own = spent([SampledGaussian(steps, noise, rate)], delta=1e-5)
        other = prv_epsilon(noise, rate, steps, 1e-5)
        over += own.epsilon > own.renyi
        if other is not None:
            apart.append(other - own.epsilon)
    return over, len(cells), apart


# -- P3: noise -----------------------------------------------------------------------------------


def predictions(values: np.ndarray, scale: str = "logits") -> Predictions:
    return Predictions(rows=np.arange(len(values)), values=np.float32(values), scale=scale)


def noise_ratios(quick: bool) -> Iterator[tuple[str, float]]:
    """Yield what was released how, and the noise found in it over what it should be."""
    numbers = 10_000 if quick else 1_000_000
    rows = numbers // CLASSES
    zeros = predictions(np.zeros((rows, CLASSES)))
    asked = Predictions.asked(np.arange(rows), CLASSES)
    for rule, unit in (
        # So short rows that no number is as large as those that are cut off when they are read.
        (GaussianRelease(noise=0.5, clip=0.01), 1.0),
        (LaplaceRelease(noise=0.5, clip=0.01), math.sqrt(2)),
    ):
        should = 0.5 * unit * sensitivity(Form(rows, CLASSES, False), clip=0.01, norm=rule.norm)
        client = ClientTurn(
            Stages(release=rule), seed=1, round=1, attempt=1, clients={0: Standing()}
        )
        yield f"{rule.kind}, client", _deviation(client.send({0: zeros})[0]) / should
        for lost in (0, 2, 5):
            came = range(CLIENTS - lost)
            uploads = [Upload(client, zeros, 5) for client in came]
            for one_out in (False, True):
                server = ServerTurn(
                    Stages(release=rule, where="server"), ExchangeState(), seed=lost, round=1
                )
                for each in came:
                    server.receive(each, zeros, asked)
                seen = list(
                    server.view(uploads, sums=None if one_out else "equal", leaves_one_out=one_out)
                )
                if one_out:
                    values = sum(upload.payload.values.astype(np.float64) for upload in seen[1:])
                    of_all = _deviation(seen[0].of_all) * len(came) / should
                    yield f"{rule.kind}, server, mean of all, {lost} of 10 lost", of_all
                    found = float(np.std(values)) / should
                else:
                    found = _deviation(seen[0].payload) * len(came) / should
                place = "means of others" if one_out else "server"
                yield f"{rule.kind}, {place}, {lost} of 10 lost", found
    yield from _votes(4 * numbers)
    yield _answers(numbers)
    yield "dp_sgd, client", _dp_sgd(quick)


def _deviation(payload: Payload | None) -> float:
    if not isinstance(payload, Predictions):
        raise TypeError("nothing was released")
    return float(payload.values.astype(np.float64).std())


def _votes(rows: int) -> Iterator[tuple[str, float]]:
    """The noise of counts follows from how often the class with most votes wins."""
    rule = Votes(noise=20 / math.sqrt(2))
    for lost in (0, 50):
        came = 100 - lost
        mean = np.tile(np.float32([(came + 20) / 2, (came - 20) / 2]) / came, (rows, 1))
        occasion = Occasion(where="server", round=1, clients=came, form=Form(rows, 2, True))
        rng = np.random.default_rng(lost)
        won = rule.release(predictions(mean, "probabilities"), occasion, rng)
        share = won.values[:, 0].mean(dtype=np.float64)  # type: ignore[attr-defined]
        found = 20 / math.sqrt(2) / norm.ppf(share)
        yield f"votes, server, {lost} of 100 lost", found / 20


def _answers(rows: int) -> tuple[str, float]:
    """How often a class is not told truly, over how often it should not be."""
    rule = RandomizedAnswers(noise=1.0)
    occasion = Occasion(where="client", round=1, form=Form(rows, CLASSES, True))
    truth = predictions(np.tile(np.eye(CLASSES)[3], (rows, 1)), "probabilities")
    told = rule.release(truth, occasion, np.random.default_rng(0))
    lies = 1 - told.values[:, 3].mean(dtype=np.float64)  # type: ignore[attr-defined]
    should = 1 - RandomizedResponse(1, 1.0, CLASSES).keep
    return "randomized_response, client (lies)", lies / should


def _dp_sgd(quick: bool) -> float:
    """A step whose gradients are next to nothing beside its noise."""
    clients, clip, noise = (2 if quick else 20), 1e-3, 1000.0
    moved = _steps([4] * clients, clip=clip, noise=noise, hidden=64, side=28)
    return float(np.std(np.concatenate(moved).astype(np.float64)) * 4 / (noise * clip))


def _steps(
    sizes: list[int],
    *,
    clip: float,
    noise: float,
    hidden: int,
    side: int,
    data: TrainingData | None = None,
    members: list[Member] | None = None,
) -> list[np.ndarray]:
    """Let members take one step from equal weights; return how far each has moved."""
    total = sum(sizes)
    draw = torch.Generator().manual_seed(0)
    if data is None:
        data = _data(
            torch.randn(total, 1, side, side, generator=draw),
            torch.randint(3, (total,), generator=draw),
        )
    ends = np.cumsum(sizes)
    if members is None:
        members = [
            Member(client, np.arange(end - size, end))
            for client, (end, size) in enumerate(zip(ends, sizes, strict=True))
        ]
    optimizer = OptimizerSettings(name="sgd", lr=1.0)
    cohort = open_cohort(
        members,
        backend="vmap",
        model=ModelSettings(name="mlp", options={"hidden": [hidden]}),
        optimizer=optimizer,
        data=data,
        pool=ModelPool(data, optimizer),
        streams=Streams(seed=7),
        private=PrivateLearning(
            clip=clip,
            batch_size=max(len(member.rows) for member in members),
            noise_multipliers=(noise,) * len(members),
            most_steps=(1,) * len(members),
        ),
    )
    cohort.load_weights(cohort.weights()[0])
    before = _flat(cohort.weights()[0])
    batch = max(len(member.rows) for member in members)
    cohort.fit(supervised, private=Passes(batch_size=batch, steps=1))
    return [before - _flat(own) for own in cohort.weights()]


def _data(inputs: torch.Tensor, labels: torch.Tensor) -> TrainingData:
    return TrainingData(
        train_inputs=inputs,
        train_labels=labels,
        public_inputs=inputs[:0],
        public_labels=None,
        num_classes=3,
    )


def _flat(weights: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([weights[name].ravel() for name in weights])


# -- P4: sensitivity -----------------------------------------------------------------------------


def answer(rng: np.random.Generator, kind: str) -> Payload:
    """Return an answer of a kind: random numbers, now and then wild or adversarial ones."""
    rows, classes = 40, 5
    values = rng.standard_normal((rows, classes)) * 10.0 ** rng.integers(-3, 6)
    match rng.integers(4):
        case 0:
            values = rng.choice(WILD, values.shape)
        case 1:
            values = np.zeros(values.shape)
            values[:, rng.integers(classes)] = rng.choice([1.0, -1.0]) * 1e9
    if kind == "class table":
        return ClassTable(values=np.float32(values[:classes]))
    if kind == "prototypes":
        held = np.flatnonzero(rng.random(rows) < 0.5)
        return Prototypes(classes=held, values=np.float32(values[held]), num_classes=rows)
    return predictions(values, "probabilities" if kind == "soft labels" else "logits")


KINDS = ("logits", "soft labels", "class table", "prototypes")


def violations(pairs: int) -> Iterator[tuple[str, int]]:
    """Yield each mechanism and how many pairs are further apart than its sensitivity."""
    rng = np.random.default_rng(0)
    for rule in (GaussianRelease(noise=1.0, clip=3.0), LaplaceRelease(noise=1.0, clip=3.0)):
        worse = 0
        for number in range(pairs):
            kind = KINDS[number % len(KINDS)]
            one, other = (bounded(answer(rng, kind), clip=3.0, norm=rule.norm) for _ in range(2))
            apart = (_values(one) - _values(other)).ravel()
            form = form_of_payload(one)
            if form is None:
                raise TypeError(f"{one.kind} is no table")
            most = sensitivity(form, clip=3.0, norm=rule.norm)
            worse += bool(np.linalg.norm(apart, ord=2 if rule.norm == "l2" else 1) > most)
        yield rule.kind, worse
    rule, worse = Votes(noise=1.0), 0
    for _ in range(pairs):
        one, other = (_values(rule.bounded(answer(rng, "logits"))) for _ in range(2))
        others = rng.multinomial(9, np.ones(5) / 5, size=40)
        apart = np.linalg.norm(one - other, axis=-1).max()
        top = np.abs((others + one).max(-1) - (others + other).max(-1)).max()
        worse += bool(apart > math.sqrt(2) * (1 + 1e-12) or top > 1)
    yield rule.kind, worse
    worse = 0
    for _ in range(pairs):
        event = RandomizedResponse(1, float(rng.uniform(0.01, 12)), int(rng.integers(2, 200)))
        chances = np.array([event.keep, event.other])
        sums = abs(event.keep + (event.classes - 1) * event.other - 1) < 1e-9
        worse += bool(math.log(chances.max() / chances.min()) > event.epsilon * (1 + 1e-9))
        worse += not sums
    yield "randomized_response", worse
    yield "dp_sgd", _moved_too_far(pairs, rng)


def _values(payload: Payload) -> np.ndarray:
    if not isinstance(payload, Predictions | ClassTable | Prototypes):
        raise TypeError(f"{payload.kind} is no table")
    return payload.values.astype(np.float64)


def _moved_too_far(pairs: int, rng: np.random.Generator) -> int:
    """Of two members one has a row more: so much may their sums of clipped gradients differ."""
    clip, worse, at_once = 0.3, 0, min(pairs, 250)
    for _ in range(-(-pairs // at_once)):
        inputs = rng.standard_normal((5 * at_once, 64)) * 10.0 ** rng.integers(-2, 5)
        odd = rng.random(at_once) < 0.5
        inputs[4::5][odd] = rng.choice(WILD, (int(odd.sum()), 64))
        data = _data(
            torch.from_numpy(inputs.astype(np.float32)).reshape(-1, 1, 8, 8),
            torch.from_numpy(rng.integers(3, size=5 * at_once)),
        )
        members = [
            Member(2 * pair + less, np.arange(5 * pair, 5 * pair + 5 - less))
            for pair in range(at_once)
            for less in (0, 1)
        ]
        moved = _steps([], clip=clip, noise=0.0, hidden=8, side=8, data=data, members=members)
        for pair in range(at_once):
            # Each is divided by its own expected batch.
            apart = 5.0 * moved[2 * pair] - 4.0 * moved[2 * pair + 1]
            # Not at most: what is no number is worse, too.
            worse += not np.linalg.norm(apart) <= clip * (1 + 1e-4)
    return worse


# -- all together --------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit status 1 below a target")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no verdict")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    options = parser.parse_args()
    before = machine()
    torch.set_num_threads(1)
    pairs = 40 if options.quick else 10_000
    error = gaussian_cells(options.quick)
    over, cells, apart = sampled_cells(options.quick)
    ratios = dict(noise_ratios(options.quick))
    worse = dict(violations(pairs))
    print(describe(before, os.getloadavg()[0]))
    for what, ratio in ratios.items():
        print(f"  noise of {what}: {ratio:.4f}")
    for what, count in worse.items():
        print(f"  {what}: {count} of {pairs} pairs further apart than the sensitivity")
    met = _table(error, over, cells, apart, ratios, worse, pairs, options)
    if options.json:
        figures = {"error": error, "prv": apart, "ratios": ratios, "violations": worse}
        print(json.dumps({**before, **figures}))
    return int(options.check and not options.quick and not met)


def _table(
    error: float,
    over: int,
    cells: int,
    apart: list[float],
    ratios: dict[str, float],
    worse: dict[str, int],
    pairs: int,
    options: Namespace,
) -> bool:
    met = [error <= 1e-6]
    row("P1", "epsilon of 50 Gaussian releases, against the closed form: largest error",
        f"{error:.1g}", "at most 1e-6", met[0], options)  # fmt: skip
    met.append(not over)
    row("P2", f"{cells} cells of DP-SGD: epsilon against Renyi's bound",
        f"above in {over}", "in none", met[-1], options)  # fmt: skip
    if apart:
        met.append(min(apart) >= 0 and max(apart) <= 0.02)
        row("P2", "the same: Opacus' PRV accountant above it by",
            f"{min(apart):.4f} to {max(apart):.4f}", "0 to 0.02", met[-1], options)  # fmt: skip
    else:
        print("opacus is not installed: P2 says nothing of its PRV accountant")
    low, high = min(ratios.values()), max(ratios.values())
    met.append(low >= 0.995 and high <= 1.005)
    row("P3", f"noise that is found over what it should be, {len(ratios)} mechanisms and places",
        f"{low:.4f} to {high:.4f}", "0.995 to 1.005", met[-1], options)  # fmt: skip
    met.append(not any(worse.values()))
    row("P4", f"pairs further apart than the sensitivity, {len(worse)} mechanisms of {pairs} each",
        str(sum(worse.values())), "0", met[-1], options)  # fmt: skip
    return all(met)


if __name__ == "__main__":
    sys.exit(main())
