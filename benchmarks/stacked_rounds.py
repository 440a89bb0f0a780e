"""What rounds of small models cost in fedkd, stacked and in the loop, beside the bare arithmetic.

32 clients with a 64-64-10 multilayer perceptron on 8x8 images, 50 private rows each, batch 10, one
local epoch, Adam, 200 public rows: rounds of ``dml``, ``fedavg`` and ``fedmd`` on the inline
backend, evaluation left out. Beside them the same arithmetic without a framework: one model after
the other, as anybody would write it, and all models in batched matrix products, by hand. Their
batches are cut before the clock starts; fedkd draws its own. Then mutual learning step by step:
``clients.local.steps=1`` of 8 clients, where a round is a step.

Rounds of all sides take turns in one process, by the processor's time and by the clock. In the end
all must hold the same weights, or the comparison is void.

    python benchmarks/stacked_rounds.py                # about a minute
    python benchmarks/stacked_rounds.py --check        # exit status 1 above a target
    python benchmarks/stacked_rounds.py --quick        # tiny, to see that it runs; says nothing
    python benchmarks/stacked_rounds.py --aten         # with the share of torch's kernels
"""

import argparse
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measurement import Samples, add_common_arguments, describe, machine, ratios, row
from torch import Tensor

from fedkd.data import FederatedData
from fedkd.models import ModelSettings, build_model
from fedkd.randomness import Purpose, generator_for
from fedkd.training import MODEL, Arrays, Passes, initial_model_seed
from sim.engine.inline import InlineGrid
from sim.server.rounds import RoundLoop
from sim.settings import Settings, settings_from_table

ROWS_PER_CLIENT = 50
BATCH_ROWS = 10
TEMPERATURE = 2.0
LEARNING_RATE = 1e-3
SAME_WEIGHTS = 1e-4
"""Largest difference that the order of floating-point sums explains; other steps exceed it."""
UNTIMED_ROUNDS = 3
"""They warm up, and in the first of them there is nothing to learn from peers yet."""
STACKED, LOOP, BARE, BY_HAND = "stacked", "loop", "bare loop", "stack by hand"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kind of round.

    Attributes:
        name: of the case.
        strategy: ``dml``, ``fedavg`` or ``fedmd``.
        clients: how many.
        public_rows: that they predict.
        steps: of a round; None: a pass over the private rows.
        targets: of sides, each as a share of another one: (side, of which, at most).
    """

    name: str
    strategy: str
    clients: int = 32
    public_rows: int = 200
    steps: int | None = None
    targets: Sequence[tuple[str, str, float]] = (
        (STACKED, BARE, 0.15),
        (STACKED, BY_HAND, 1.7),
        (LOOP, BARE, 1.15),
    )

    @property
    def local(self) -> Passes:
        """How a client walks through its private rows in a round."""
        return Passes(batch_size=BATCH_ROWS, steps=self.steps)


CASES = (
    Case(name="dml", strategy="dml"),
    Case(name="fedavg", strategy="fedavg"),
    Case(name="fedmd", strategy="fedmd"),
    Case(
        name="dml step by step",
        strategy="dml",
        clients=8,
        public_rows=64,
        steps=1,
        targets=((LOOP, BARE, 1.3), (STACKED, BARE, 0.4)),
    ),
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--aten", action="store_true", help="share of torch's kernels as well")
    add_common_arguments(parser, repeats=25, at_most=0.15)
    options = parser.parse_args()
    if options.quick:
        options.repeats = 1
    return options


def main() -> int:
    options = arguments()
    torch.set_num_threads(1)
    before = machine()
    missed = False
    tables: dict[str, Any] = {}
    for case in (case for case in CASES if case.name in options.only):
        turns = Turns(case, options.repeats)
        turns.take()
        tables[case.name] = {side: of.to_table() for side, of in turns.cpu.items()}
        print(f"a round of {case.clients} clients, {case.name}; CPU seconds, then by the clock:")
        for side in turns.cpu:
            print(f"  {side:14} {turns.cpu[side].text()}; {turns.wall[side].text()}")
        for side, of, at_most in case.targets:
            share = ratios(turns.cpu[side], turns.cpu[of])
            missed = missed or share.median > at_most
            row(
                "R1",
                f"round of {case.clients} MLP clients, {case.name}, {side}, against a {of}",
                share.text(),
                f"at most {at_most:g}",
                share.median <= at_most,
                options,
            )
        difference = turns.largest_difference()
        print(f"largest difference between the weights of any two: {difference:g}")
        if options.aten:
            for side, part in turns.kernel_shares().items():
                print(f"  {side}: {part:.0%} in torch's kernels")
        if difference > SAME_WEIGHTS:
            print("the sides did not compute the same: the figures are void")
            return 1
    print(describe(before, os.getloadavg()[0]))
    if options.json:
        print(json.dumps({**before, "cpu": tables}))
    return int(missed and options.check and not options.quick)


# -- what takes turns --------------------------------------------------------------------------


class Side(ABC):
    """Something that goes through the rounds of a case."""

    @abstractmethod
    def round(self) -> None:
        """Go through the next one."""

    @abstractmethod
    def weights(self) -> list[Arrays]:
        """Return what every client's model holds."""


class PausedError(Exception):
    """Ends a run at the end of a round; it goes on from there."""


class Ours(Side):
    """A run of fedkd, as ``engine.backend: inline`` makes it."""

    def __init__(self, case: Case, data: FederatedData, rounds: int, vectorize: str) -> None:
        settings = settings_of(case, rounds, vectorize)
        self._clients = case.clients
        self._grid = InlineGrid(settings, data)
        self._loop = RoundLoop(self._grid, settings, data, [])

    def round(self) -> None:
        try:
            self._loop.run(_pause)
        except PausedError:
            return

    def weights(self) -> list[Arrays]:
        states = self._grid.client_states(range(self._clients))
        return [state.models[MODEL].weights for state in states if state is not None]


def _pause() -> None:
    raise PausedError


class Turns:
    """Lets all sides of a case go through its rounds by turns, and times them.

    Attributes:
        cpu, wall: seconds of a round of each side.
    """

    def __init__(self, case: Case, repeats: int) -> None:
        # The run ends with a round that nobody reaches, in which clients would be judged; and a
        # few more, for a profile.
        rounds = UNTIMED_ROUNDS + repeats + 20
        data = synthetic_data(case)
        batches = Batches(case, data, rounds)
        self._repeats = repeats
        self._strategy = case.strategy
        self._sides: dict[str, Side] = {
            STACKED: Ours(case, data, rounds, "vmap"),
            LOOP: Ours(case, data, rounds, "loop"),
            BARE: BareLoop(batches),
            BY_HAND: BareStack(batches),
        }
        self.cpu = {side: Samples() for side in self._sides}
        self.wall = {side: Samples() for side in self._sides}

    def take(self) -> None:
        """Go through the rounds; those that warm up do not count."""
        for number in range(UNTIMED_ROUNDS + self._repeats):
            for name, side in self._sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                side.round()
                if number >= UNTIMED_ROUNDS:
                    self.cpu[name].values.append(time.process_time() - cpu)
                    self.wall[name].values.append(time.perf_counter() - wall)

    def largest_difference(self) -> float:
        """Return the largest absolute difference between any weights and those of the bare loop."""
        sides = [side.weights() for side in self._sides.values()]
        bare = self._sides[BARE].weights()
        return max(
            float(np.abs(array - bare[client][name]).max())
            for weights in sides
            for client, own in enumerate(weights)
            for name, array in own.items()
        )

    def kernel_shares(self) -> dict[str, float]:
        """Return, for each side, what share of a round its ATen kernels take."""
        return {name: kernel_share(side.round) for name, side in self._sides.items()}


def kernel_share(work: Callable[[], None], times: int = 1) -> float:
    """Return the share of the processor's time that is spent below ``torch``'s dispatcher.

    What the profiler adds to every kernel is taken from a run without it: the kernels' own time
    under the profiler over all time without, which errs on the side of the kernels.
    """
    started = time.process_time()
    for _ in range(times):
        work()
    bare = time.process_time() - started
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(times):
            work()
    kernels = sum(event.self_cpu_time_total for event in profile.key_averages()) / 1e6
    return float(min(1.0, kernels / bare))


# -- what is computed --------------------------------------------------------------------------


def settings_of(case: Case, rounds: int, vectorize: str) -> Settings:
    local = {"epochs": 1} if case.steps is None else {"steps": case.steps}
    temperature = {"temperature": TEMPERATURE} if case.strategy == "dml" else {}
    return settings_from_table(
        {
            "rounds": rounds,
            "data": {
                "public": {"size": case.public_rows},
                "partition": {"kind": "iid"},
                "private_rows": ROWS_PER_CLIENT * case.clients,
                "test_rows": 10,
            },
            "clients": {
                "count": case.clients,
                "models": ["mlp"],
                "batch_size": BATCH_ROWS,
                "optimizer": {"name": "adam", "lr": LEARNING_RATE},
                "local": local,
            },
            "strategy": {"name": case.strategy, **temperature},
            "engine": {"backend": "inline", "vectorize": vectorize},
            "evaluation": {"every": rounds},
        }
    )


def synthetic_data(case: Case) -> FederatedData:
    """Return noise in the shape of small digits."""
    rng = np.random.default_rng(0)

    def images(rows: int) -> np.ndarray:
        return rng.standard_normal((rows, 1, 8, 8), dtype=np.float32)

    private = ROWS_PER_CLIENT * case.clients
    return FederatedData(
        name="noise",
        class_names=tuple("0123456789"),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=images(private),
        train_labels=rng.integers(10, size=private),
        client_rows=tuple(np.arange(private).reshape(case.clients, -1)),
        public_inputs=images(case.public_rows),
        public_labels=None,
        validation_inputs=images(10),
        validation_labels=np.arange(10),
        test_inputs=images(10),
        test_labels=np.arange(10),
    )


class Batches:
    """What the bare sides are given: tensors, and every batch of every round.

    Attributes:
        case: of them.
        inputs, labels: private rows of all clients.
        public: public rows.
        private_rows: by round ``[clients, steps, width]``.
        public_rows: the same; the steps beside private rows, or for ``fedmd`` those before them.
        modules: every client's first model.
    """

    def __init__(self, case: Case, data: FederatedData, rounds: int) -> None:
        self.case = case
        self.inputs = torch.from_numpy(data.train_inputs)
        self.labels = torch.from_numpy(data.train_labels)
        self.public = torch.from_numpy(data.public_inputs)
        self.private_rows: list[Tensor] = []
        self.public_rows: list[Tensor] = []
        # All runs have the seed that is the default of settings.
        seed = settings_of(case, rounds, "loop").seed
        for number in range(1, rounds + 1):
            private, public = [], []
            for client, rows in enumerate(data.client_rows):
                rng = generator_for(seed, Purpose.TRAIN, number, client, 0)
                rng.integers(2**62)  # the seed of dropout, which these models do not have
                own = case.local.batches(len(rows), rng)
                private.append(np.stack([rows[batch] for batch in own]))
                passes = case.local.spread_over(len(own), case.public_rows)
                if case.strategy == "fedmd":
                    rng = generator_for(seed, Purpose.TRAIN_PUBLIC, number, client, 0)
                    rng.integers(2**62)
                    passes = Passes(batch_size=BATCH_ROWS)
                public.append(np.stack(passes.batches(case.public_rows, rng)))
            self.private_rows.append(torch.from_numpy(np.stack(private)))
            self.public_rows.append(torch.from_numpy(np.stack(public)))
        # What everybody starts from is the first client's model where weights are averaged.
        averages = case.strategy == "fedavg"
        self.modules = [
            build_model(
                ModelSettings(name="mlp"),
                input_shape=(1, 8, 8),
                num_classes=10,
                seed=initial_model_seed(seed, 0 if averages else client),
            )
            for client in range(case.clients)
        ]


def mutual_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of softened predictions ``[..., rows, classes]``, averaged over rows."""
    student = F.log_softmax(logits / TEMPERATURE, dim=-1)
    of_rows = (torch.xlogy(targets, targets) - targets * student).sum(-1)
    return of_rows.mean(-1) * TEMPERATURE**2


class BareLoop(Side):
    """One client after the other, without a framework: the yardstick."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._strategy = batches.case.strategy
        self._modules = batches.modules
        self._optimizers = [self._optimizer(module) for module in self._modules]
        self._targets: Tensor | None = None
        self._average: dict[str, Tensor] | None = None
        self._number = 0

    @staticmethod
    def _optimizer(module: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)

    def round(self) -> None:
        private = self._batches.private_rows[self._number]
        public = self._batches.public_rows[self._number]
        answers = []
        for client, module in enumerate(self._modules):
            optimizer = self._optimizers[client]
            module.train()
            if self._strategy == "fedavg":
                if self._average is not None:
                    module.load_state_dict(self._average)
                optimizer = self._optimizer(module)
            if self._strategy == "fedmd" and self._targets is not None:
                for rows in public[client]:
                    self._digest(module, optimizer, rows)
            for step, rows in enumerate(private[client]):
                self._step(module, optimizer, client, rows, public[client, step])
            if self._strategy != "fedavg":
                module.eval()
                with torch.inference_mode():
                    answers.append(module(self._batches.public))
        self._take_in(answers)
        self._number += 1

    def _digest(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: Tensor
    ) -> None:
        assert self._targets is not None  # noqa: S101
        logits = module(self._batches.public[rows])
        loss = (logits - self._targets[rows]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _step(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        client: int,
        rows: Tensor,
        public_rows: Tensor,
    ) -> None:
        inputs, labels = self._batches.inputs[rows], self._batches.labels[rows]
        mutual = self._strategy == "dml" and self._targets is not None
        if mutual:
            inputs = torch.cat([inputs, self._batches.public[public_rows]])
        logits = module(inputs)
        loss = F.cross_entropy(logits[: len(rows)], labels)
        if mutual:
            assert self._targets is not None  # noqa: S101
            targets = self._targets[client][public_rows]
            loss = loss + mutual_loss(logits[len(rows) :], targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def _take_in(self, answers: Sequence[Tensor]) -> None:
        """Do what a server does."""
        match self._strategy:
            case "fedavg":
                states = [module.state_dict() for module in self._modules]
                self._average = {
                    name: torch.stack([state[name] for state in states]).double().mean(0).float()
                    for name in states[0]
                }
            case "fedmd":
                self._targets = torch.stack(list(answers)).double().mean(0).float()
            case _:
                self._targets = taught_by_others(torch.stack(list(answers)))

    def weights(self) -> list[Arrays]:
        return [
            {name: tensor.numpy() for name, tensor in module.state_dict().items()}
            for module in self._modules
        ]


def taught_by_others(logits: Tensor) -> Tensor:
    """Return the mean of the other clients' softened predictions ``[clients, rows, classes]``."""
    predictions = F.softmax(logits / TEMPERATURE, dim=-1).double()
    return ((predictions.sum(0) - predictions) / (len(logits) - 1)).float()


@dataclass
class BareStack(Side):
    """All clients in batched matrix products, written by hand for this very model."""

    batches: Batches
    number: int = 0
    targets: Tensor | None = None
    parameters: list[Tensor] = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        states = [module.state_dict() for module in self.batches.modules]
        self.names = list(states[0])
        # Weights [clients, in, out], biases [clients, 1, out].
        self.parameters = [
            torch.stack([self._turned(state[name]) for state in states]).contiguous()
            for name in self.names
        ]
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.optimizer = self._optimizer()

    @staticmethod
    def _turned(tensor: Tensor) -> Tensor:
        return tensor.t() if tensor.ndim == 2 else tensor[None]

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters, lr=LEARNING_RATE, fused=True)

    def _logits(self, inputs: Tensor) -> Tensor:
        """Return ``[clients, rows, classes]`` of inputs ``[clients, rows, ...]``."""
        first, first_bias, last, last_bias = self.parameters
        hidden = torch.baddbmm(first_bias, inputs.flatten(2), first).relu()
        return torch.baddbmm(last_bias, hidden, last)

    def round(self) -> None:
        case, batches = self.batches.case, self.batches
        private = batches.private_rows[self.number]
        public = batches.public_rows[self.number]
        clients = torch.arange(case.clients)[:, None]
        if case.strategy == "fedavg":
            self.optimizer = self._optimizer()
        if case.strategy == "fedmd" and self.targets is not None:
            for rows in public.unbind(1):
                logits = self._logits(batches.public[rows])
                self._descend((logits - self.targets[rows]).abs().mean((1, 2)).sum())
        for step, rows in enumerate(private.unbind(1)):
            inputs, labels = batches.inputs[rows], batches.labels[rows]
            mutual = case.strategy == "dml" and self.targets is not None
            if mutual:
                inputs = torch.cat([inputs, batches.public[public[:, step]]], dim=1)
            logits = self._logits(inputs)
            own = logits[:, : rows.shape[1]].flatten(0, 1)
            loss = F.cross_entropy(own, labels.flatten(), reduction="sum") / rows.shape[1]
            if mutual:
                assert self.targets is not None  # noqa: S101
                targets = self.targets[clients, public[:, step]]
                loss = loss + mutual_loss(logits[:, rows.shape[1] :], targets).sum()
            self._descend(loss)
        with torch.no_grad():
            self._take_in()
        self.number += 1

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def _take_in(self) -> None:
        """Do what a server does."""
        case, public = self.batches.case, self.batches.public
        if case.strategy == "fedavg":
            # Every client's weights as they stand after training are what `weights` returns.
            self.trained = [parameter.clone() for parameter in self.parameters]
            for parameter in self.parameters:
                parameter.copy_(parameter.double().mean(0).float().expand_as(parameter))
            return
        logits = self._logits(public.expand(case.clients, *public.shape))
        if case.strategy == "fedmd":
            self.targets = logits.double().mean(0).float()
        else:
            self.targets = taught_by_others(logits)

    def weights(self) -> list[Arrays]:
        case = self.batches.case
        held = self.trained if case.strategy == "fedavg" else self.parameters
        return [
            {
                name: (own.t() if len(own) > 1 else own[0]).detach().numpy()
                for name, own in zip(self.names, (each[at] for each in held), strict=True)
            }
            for at in range(case.clients)
        ]


if __name__ == "__main__":
    sys.exit(main())
