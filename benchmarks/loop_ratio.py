"""What a full round of mutual distillation costs beside a bare PyTorch loop that does the same.

100 clients with LeNet (61,706 parameters) and 50 rows of 28x28 pixels each, batch 10, one local
epoch, Adam, 200 public rows, strategy ``dml``. In a round every client takes 5 steps, each on 10
private and 40 public rows, and predicts the 200 public rows; the server averages the softened
predictions and gives each client the mean of the others. Evaluation is left out on both sides.

Ours is `RoundLoop` over `RayGrid` with one worker and the loop backend, as `fedkd run` does it:
states travel, messages are made, replies are checked, bytes and metrics are counted. The bare
loop is one process with one thread that keeps a model and an optimizer for every client in
memory and has its batches cut before the clock starts. It uses the same kernels: fused Adam, and
convolutions with the channels of a pixel side by side. Rounds of the two alternate in one run,
and in the end both must hold the same weights, or the comparison is void. Both sides compute at
the same priority.

    python benchmarks/loop_ratio.py                # about 3 minutes
    python benchmarks/loop_ratio.py --data FOLDER  # images of a Parquet folder, such as MNIST
    python benchmarks/loop_ratio.py --check        # exit status 1 above the target
    python benchmarks/loop_ratio.py --quick        # tiny, to see that it runs; says nothing

Without ``--data`` the images are noise. Maximum pooling takes a few percent longer over noise than
over digits, on both sides alike.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measurement import (
    Samples,
    add_common_arguments,
    describe,
    exit_status,
    machine,
    ratios,
    row,
    stopwatch,
    verdict,
)

from fedkd.data import FederatedData, build_federated_data
from fedkd.models import ModelSettings, build_model
from fedkd.randomness import Purpose, generator_for
from fedkd.training import MODEL, Arrays, Passes, initial_model_seed
from sim.commands.running import open_grid
from sim.engine.resources import available_cpus
from sim.server.observers import Observer, Row
from sim.server.rounds import RoundLoop
from sim.settings import Settings, settings_from_table

ROWS_PER_CLIENT = 50
PUBLIC_ROWS = 200
BATCH_ROWS = 10
TEMPERATURE = 2.0
LEARNING_RATE = 1e-3
SAME_WEIGHTS = 1e-4
"""Largest difference that the order of floating-point sums explains; other steps exceed it."""
UNTIMED_ROUNDS = 2
"""The first warms up and has nothing to learn from peers yet; the last one is evaluated."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="FOLDER", help="Parquet files of 28x28 images")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--backend", choices=("ray", "inline"), default="ray")
    add_common_arguments(parser, repeats=15, at_most=1.04)
    options = parser.parse_args()
    if options.quick:
        options.clients, options.repeats = 3, 1
    return options


def main() -> int:
    options = arguments()
    before = machine()
    settings = settings_of(options)
    data = synthetic_data(options.clients) if options.data is None else real_data(settings)
    with BareProcess(BareRun.of(settings, data)) as bare:
        turns = Turns(bare)
        with open_grid(settings, data) as grid:
            turns.take_over()
            RoundLoop(grid, settings, data, [turns]).run()
            states = list(grid.client_states(range(options.clients)))
        difference = largest_difference(
            [state.models[MODEL].weights for state in states if state is not None], bare.weights()
        )
    ours, theirs = Samples(turns.ours[1:-1]), Samples(turns.bare[1:-1])
    ratio = ratios(ours, theirs)
    print(describe(before, os.getloadavg()[0]))
    print(f"a round of {options.clients} clients, one worker ({options.backend}), seconds:")
    print(f"  bare loop  {theirs.text()}")
    print(f"  fedkd      {ours.text()}")
    print(f"largest difference between the weights of the two: {difference:g}")
    row(
        "B2",
        f"round of {options.clients} LeNet clients, one worker, against a bare loop",
        ratio.text(4),
        f"at most {options.at_most:g}",
        ratio.median <= options.at_most,
        options,
    )
    print(f"ratio {ratio.text(4)}; {verdict(ratio, options)}")
    if options.json:
        tables = {"bare": theirs.to_table(), "ours": ours.to_table(), "ratio": ratio.to_table()}
        print(json.dumps({**before, **tables, "weight_difference": difference}))
    if difference > SAME_WEIGHTS:
        print("the two did not compute the same: the ratio is void")
        return 1
    return exit_status(ratio, options)


def settings_of(options: argparse.Namespace) -> Settings:
    data: dict[str, Any] = {
        "public": {"size": PUBLIC_ROWS},
        "partition": {"kind": "iid"},
        "private_rows": ROWS_PER_CLIENT * options.clients,
        "test_rows": 10,
    }
    if options.data is not None:
        data["source"] = options.data
    rounds = options.repeats + UNTIMED_ROUNDS
    return settings_from_table(
        {
            "rounds": rounds,
            "data": data,
            "clients": {
                "count": options.clients,
                "models": ["lenet"],
                "batch_size": BATCH_ROWS,
                "optimizer": {"name": "adam", "lr": LEARNING_RATE},
                "local": {"epochs": 1},
            },
            "strategy": {"name": "dml", "temperature": TEMPERATURE},
            "engine": {
                "backend": options.backend,
                "cpus_per_worker": available_cpus(),
                "vectorize": "loop",
            },
            "evaluation": {"every": rounds},
        }
    )


def real_data(settings: Settings) -> FederatedData:
    return build_federated_data(
        settings.data, num_clients=settings.clients.count, seed=settings.seed
    )


def synthetic_data(clients: int) -> FederatedData:
    """Return noise in the shape of MNIST."""
    rng = np.random.default_rng(0)

    def images(rows: int) -> np.ndarray:
        return rng.standard_normal((rows, 1, 28, 28), dtype=np.float32)

    private = ROWS_PER_CLIENT * clients
    return FederatedData(
        name="noise",
        class_names=tuple("0123456789"),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=images(private),
        train_labels=rng.integers(10, size=private),
        client_rows=tuple(np.arange(private).reshape(clients, -1)),
        public_inputs=images(PUBLIC_ROWS),
        public_labels=None,
        validation_inputs=images(10),
        validation_labels=np.arange(10),
        test_inputs=images(10),
        test_labels=np.arange(10),
    )


class Turns(Observer):
    """Times our rounds from the outside and lets the bare loop take its turn after each."""

    def __init__(self, bare: "BareProcess") -> None:
        self._process = bare
        self._started = 0.0
        self.ours: list[float] = []
        self.bare: list[float] = []

    def take_over(self) -> None:
        """Start the clock of our next round."""
        self._started = time.perf_counter()

    def exchange(self, rows: Sequence[Row]) -> None:
        # The last thing that a round does.
        self.ours.append(time.perf_counter() - self._started)
        self.bare.append(self._process.round())
        self.take_over()


def largest_difference(ours: Sequence[Arrays], bare: Sequence[Arrays]) -> float:
    """Return the largest absolute difference between any two weights."""
    return max(
        float(np.abs(array - other[name]).max())
        for weights, other in zip(ours, bare, strict=True)
        for name, array in weights.items()
    )


# -- the bare loop -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BareRun:
    """What the bare loop is given: plain arrays, and every batch of every round.

    Attributes:
        inputs, labels: private rows of all clients.
        public: public rows.
        private_batches: by round and client, the rows of each step.
        public_batches: the same for public rows; empty in the first round.
        seeds: of each client's first weights.
    """

    inputs: np.ndarray
    labels: np.ndarray
    public: np.ndarray
    private_batches: list[list[list[np.ndarray]]]
    public_batches: list[list[list[np.ndarray]]]
    seeds: list[int]

    @classmethod
    def of(cls, settings: Settings, data: FederatedData) -> "BareRun":
        """Cut the batches that a run with these settings will draw."""
        private: list[list[list[np.ndarray]]] = []
        public: list[list[list[np.ndarray]]] = []
        for round in range(1, settings.rounds + 1):
            private.append([])
            public.append([])
            for client, rows in enumerate(data.client_rows):
                rng = generator_for(settings.seed, Purpose.TRAIN, round, client, 0)
                rng.integers(2**62)  # the seed of dropout, which LeNet does not have
                local = Passes(batch_size=BATCH_ROWS)
                batches = local.batches(len(rows), rng)
                private[-1].append([rows[batch] for batch in batches])
                lesson = local.spread_over(len(batches), PUBLIC_ROWS)
                # Before the second round there is nothing to learn from peers.
                public[-1].append(lesson.batches(PUBLIC_ROWS, rng) if round > 1 else [])
        return cls(
            inputs=data.train_inputs,
            labels=data.train_labels,
            public=data.public_inputs,
            private_batches=private,
            public_batches=public,
            seeds=[initial_model_seed(settings.seed, client) for client in range(data.num_clients)],
        )


class BareLoop:
    """Deep mutual learning without a framework: the yardstick."""

    def __init__(self, run: BareRun) -> None:
        torch.set_num_threads(1)
        self._inputs = torch.from_numpy(run.inputs)
        self._labels = torch.from_numpy(run.labels)
        self._public = torch.from_numpy(run.public)
        self._private_batches = as_tensors(run.private_batches)
        self._public_batches = as_tensors(run.public_batches)
        self.models = [
            build_model(
                ModelSettings(name="lenet"), input_shape=(1, 28, 28), num_classes=10, seed=seed
            ).to(memory_format=torch.channels_last)
            for seed in run.seeds
        ]
        self._optimizers = [
            torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True)
            for model in self.models
        ]
        self._targets: list[torch.Tensor] = []
        self._round = 0

    def round(self) -> None:
        """Let every client learn and predict, then average."""
        predictions = []
        for client, (model, optimizer) in enumerate(
            zip(self.models, self._optimizers, strict=True)
        ):
            model.train()
            for step, rows in enumerate(self._private_batches[self._round][client]):
                inputs, labels = self._inputs[rows], self._labels[rows]
                if self._targets:
                    public_rows = self._public_batches[self._round][client][step]
                    inputs = torch.cat([inputs, self._public[public_rows]])
                logits = model(inputs)
                loss = F.cross_entropy(logits[: len(rows)], labels)
                if self._targets:
                    student = F.log_softmax(logits[len(rows) :] / TEMPERATURE, dim=-1)
                    target = self._targets[client][public_rows]
                    rows_kl = (torch.xlogy(target, target) - target * student).sum(-1)
                    loss = loss + rows_kl.mean() * TEMPERATURE**2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            with torch.inference_mode():
                predictions.append(F.softmax(model(self._public) / TEMPERATURE, dim=-1).double())
        total = predictions[0].clone()
        for prediction in predictions[1:]:
            total += prediction
        peers = len(predictions) - 1
        self._targets = [((total - own) / peers).float().clone() for own in predictions]
        self._round += 1


def as_tensors(batches: list[list[list[np.ndarray]]]) -> list[list[list[torch.Tensor]]]:
    return [
        [[torch.from_numpy(rows) for rows in steps] for steps in clients] for clients in batches
    ]


class BareProcess:
    """A `BareLoop` in a process of its own, which works only when it is told to."""

    def __init__(self, run: BareRun) -> None:
        # A fresh interpreter: nothing of Ray or Flower lives in it.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, run), daemon=True)
        self._process.start()
        self._ask("ready")

    def round(self) -> float:
        """Run one round; return its seconds."""
        seconds: float = self._ask("round")
        return seconds

    def weights(self) -> list[Arrays]:
        """Return every client's weights."""
        weights: list[Arrays] = self._ask("weights")
        return weights

    def _ask(self, question: str) -> Any:
        self._connection.send(question)
        return self._connection.recv()

    def __enter__(self) -> "BareProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join(timeout=10)


def serve(connection: Connection, run: BareRun) -> None:
    """Answer a `BareProcess` until it hangs up."""
    loop = BareLoop(run)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        match question:
            case "round":
                seconds: list[float] = []
                with stopwatch(seconds):
                    loop.round()
                connection.send(seconds[0])
            case "weights":
                connection.send(
                    [
                        {name: tensor.numpy() for name, tensor in model.state_dict().items()}
                        for model in loop.models
                    ]
                )
            case _:
                connection.send(question)


if __name__ == "__main__":
    sys.exit(main())
