"""The loop backend: a cohort's members train one after the other. The reference for any other."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.models import ModelSettings, build_model
from fedkd.randomness import Purpose, generator_for, seeded_torch, torch_seed_for
from fedkd.training.batches import Passes
from fedkd.training.cohort import (
    Cohort,
    Member,
    PublicLesson,
    Streams,
    TrainingData,
    as_tensor,
)
from fedkd.training.objectives import Batch, Objective, Outputs, total
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.state import Arrays, ClientState, ModelState

# Fixed, because the width of a matrix product may change its last bit.
PREDICT_ROWS = 1024

MODEL = "model"
"""The name of a client's model where it has only one."""


class Slot:
    """One model and its optimizer, reused for client after client."""

    def __init__(
        self, module: nn.Module, optimizer: OptimizerSettings, device: torch.device
    ) -> None:
        self.module = module.to(device)
        self.optimizer = optimizer.build(self.module.parameters())
        self._parameters = dict(self.module.named_parameters())
        self._tensors: dict[str, Tensor] = {
            name: tensor.detach() for name, tensor in self.module.state_dict().items()
        }

    def load(self, state: ModelState) -> None:
        """Copy a model's weights and its optimizer's slots in."""
        self.load_weights(state.weights)
        self.optimizer.state.clear()
        for key, array in state.optimizer.items():
            slot, name = key.split("/", 1)
            parameter = self._parameters[name]
            # Step counters stay on the CPU, where torch.optim keeps them.
            device = torch.device("cpu") if slot == "step" else parameter.device
            self.optimizer.state[parameter][slot] = torch.tensor(array, device=device)

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Copy parameters and buffers in."""
        if weights.keys() != self._tensors.keys():
            odd = sorted(weights.keys() ^ self._tensors.keys())
            raise ValueError(f"weights do not fit the model: {', '.join(odd[:5])}")
        with torch.no_grad():
            for name, array in weights.items():
                tensor = self._tensors[name]
                if tensor.shape != array.shape:
                    raise ValueError(
                        f"weight {name!r} has shape {array.shape}, the model has "
                        f"{tuple(tensor.shape)}"
                    )
                tensor.copy_(as_tensor(array))

    def weights(self) -> Arrays:
        """Return a copy of parameters and buffers."""
        return {name: _to_numpy(tensor) for name, tensor in self._tensors.items()}

    def state(self) -> ModelState:
        """Return a copy of weights and optimizer slots."""
        slots = {
            f"{slot}/{name}": _to_numpy(value)
            for name, parameter in self._parameters.items()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return ModelState(weights=self.weights(), optimizer=slots)


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return np.array(tensor.detach().cpu().numpy())


class ModelPool:
    """The models a worker keeps at hand, so that no call has to build one.

    What is in a slot between calls never matters: every call loads its clients' states first.
    """

    def __init__(self, data: TrainingData, optimizer: OptimizerSettings) -> None:
        self._data = data
        self._optimizer = optimizer
        self._device = data.train_inputs.device
        self._slots: dict[str, list[Slot]] = {}

    def slots(self, model: ModelSettings, count: int) -> list[Slot]:
        """Return ``count`` slots of one architecture, the caller's until the next call."""
        slots = self._slots.setdefault(model.key, [])
        while len(slots) < count:
            module = self._build(model, seed=0)
            slots.append(Slot(module, self._optimizer, self._device))
        return slots[:count]

    def initial_state(self, model: ModelSettings, seed: int) -> ClientState:
        """Return a fresh model's state; the seed decides its weights."""
        weights = {
            name: _to_numpy(tensor)
            for name, tensor in self._build(model, seed).state_dict().items()
        }
        return ClientState({MODEL: ModelState(weights=weights)})

    def _build(self, model: ModelSettings, seed: int) -> nn.Module:
        return build_model(
            model,
            input_shape=self._data.input_shape,
            num_classes=self._data.num_classes,
            seed=seed,
        )


def initial_model_seed(seed: int, client: int) -> int:
    """Return the seed of a client's first weights: the same in every arm of a study."""
    return torch_seed_for(seed, Purpose.MODEL, client)


class LoopCohort(Cohort):
    """Members train one after the other; each has a model of its own while the call lasts."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        model: ModelSettings,
        optimizer: OptimizerSettings,
        data: TrainingData,
        pool: ModelPool,
        streams: Streams,
    ) -> None:
        self.clients = tuple(member.client for member in members)
        self._members = tuple(members)
        self._optimizer_settings = optimizer
        self._data = data
        self._streams = streams
        self._fits = 0
        self._terms: list[dict[str, list[Tensor]]] = [{} for _ in members]
        self._slots = pool.slots(model, len(members))
        for member, slot in zip(members, self._slots, strict=True):
            state = member.state or pool.initial_state(
                model, initial_model_seed(streams.seed, member.client)
            )
            slot.load(state.models[MODEL])

    def fit(  # noqa: D102
        self,
        objective: Objective,
        *,
        private: Passes | None = None,
        public: PublicLesson | None = None,
    ) -> None:
        for position, (member, slot) in enumerate(zip(self._members, self._slots, strict=True)):
            key = self._streams.key(member, self._fits)
            rng = generator_for(self._streams.seed, self._streams.purpose, *key)
            # Dropout draws from torch's global generator.
            with seeded_torch(int(rng.integers(2**62))):
                self._fit_one(position, member, slot, objective, private, public, rng)
        self._fits += 1

    def _fit_one(
        self,
        position: int,
        member: Member,
        slot: Slot,
        objective: Objective,
        private: Passes | None,
        public: PublicLesson | None,
        rng: np.random.Generator,
    ) -> None:
        feeds = _Feeds(self._data, member, position, private, public, rng)
        terms = self._terms[position]
        group = slot.optimizer.param_groups[0]
        # Every fit, because an evaluation in between leaves the model in evaluation mode.
        slot.module.train()
        for step in range(feeds.steps):
            group["lr"] = self._optimizer_settings.learning_rate(
                self._streams.progress(step, feeds.steps)
            )
            inputs, num_private, batch = feeds.step(step)
            logits = slot.module(inputs)
            outputs = Outputs(
                private=logits[:num_private] if num_private else None,
                public=logits[num_private:] if num_private < len(logits) else None,
            )
            losses = objective(outputs, batch)
            slot.optimizer.zero_grad(set_to_none=True)
            total(losses).backward()
            slot.optimizer.step()
            for name, loss in losses.items():
                # Kept as they are: to read or add up numbers here would hold up every step.
                terms.setdefault(name, []).append(loss.detach())

    def predict(  # noqa: D102
        self, inputs: Float[Tensor, "rows channels height width"]
    ) -> Float[np.ndarray, "members rows classes"]:
        out = np.empty((len(self._slots), len(inputs), self._data.num_classes), np.float32)
        with torch.inference_mode():
            for position, slot in enumerate(self._slots):
                slot.module.eval()
                for start in range(0, len(inputs), PREDICT_ROWS):
                    chunk = inputs[start : start + PREDICT_ROWS]
                    out[position, start : start + PREDICT_ROWS] = slot.module(chunk).cpu().numpy()
        return out

    def predict_public(self, rows: np.ndarray) -> Float[np.ndarray, "members rows classes"]:  # noqa: D102
        inputs = self._data.public_inputs
        if len(rows) == len(inputs) and np.array_equal(rows, np.arange(len(inputs))):
            return self.predict(inputs)
        return self.predict(inputs[as_tensor(rows).to(inputs.device)])

    def weights(self) -> list[Arrays]:  # noqa: D102
        return [slot.weights() for slot in self._slots]

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:  # noqa: D102
        for slot in self._slots:
            slot.load_weights(weights)

    def reset_optimizers(self) -> None:  # noqa: D102
        for slot in self._slots:
            slot.optimizer.state.clear()

    def states(self) -> list[ClientState]:  # noqa: D102
        return [ClientState({MODEL: slot.state()}) for slot in self._slots]

    def metrics(self) -> list[dict[str, float]]:  # noqa: D102
        return [
            {f"loss/{name}": float(torch.stack(losses).mean()) for name, losses in terms.items()}
            for terms in self._terms
        ]


class _Feeds:
    """The batches of one member's fit, cut before its first step."""

    def __init__(
        self,
        data: TrainingData,
        member: Member,
        position: int,
        private: Passes | None,
        public: PublicLesson | None,
        rng: np.random.Generator,
    ) -> None:
        if private is None and public is None:
            raise ValueError("fit needs private rows, public rows or both")
        self._data = data
        self._private: Sequence[Tensor] | None = None
        self._public: Sequence[tuple[Tensor, Tensor]] | None = None
        self._targets: Tensor | None = None
        device = data.train_inputs.device
        self.steps = 0
        if private is not None:
            batches = private.batches(len(member.rows), rng)
            self._private = _rows_of(batches, member.rows, device)
            self.steps = len(batches)
        if public is not None:
            passes = public.passes
            if private is not None:
                passes = passes.spread_over(self.steps, len(public.rows))
            batches = passes.batches(len(public.rows), rng)
            positions = np.arange(len(public.rows))
            self._public = list(
                zip(
                    _rows_of(batches, public.rows, device),
                    _rows_of(batches, positions, device),
                    strict=True,
                )
            )
            self.steps = len(batches)
            if public.targets is not None:
                targets = public.targets
                own = targets[position] if targets.ndim == 3 else targets
                self._targets = as_tensor(own).to(device)

    def step(self, step: int) -> tuple[Tensor, int, Batch]:
        """Return a step's inputs, how many of them are private, and the batch."""
        inputs: list[Tensor] = []
        num_private = 0
        labels = targets = public_labels = None
        if self._private is not None:
            rows = self._private[step]
            inputs.append(self._data.train_inputs[rows])
            labels = self._data.train_labels[rows]
            num_private = len(rows)
        if self._public is not None:
            rows, positions = self._public[step]
            inputs.append(self._data.public_inputs[rows])
            if self._targets is not None:
                targets = self._targets[positions]
            if self._data.public_labels is not None:
                public_labels = self._data.public_labels[rows]
        batch = Batch(labels=labels, targets=targets, public_labels=public_labels)
        return torch.cat(inputs) if len(inputs) > 1 else inputs[0], num_private, batch


def _rows_of(
    batches: Sequence[np.ndarray], rows: np.ndarray, device: torch.device
) -> tuple[Tensor, ...]:
    """Return ``rows[batch]`` for each batch; all of them go to the device in one piece."""
    if not batches:
        return ()
    together = as_tensor(rows[np.concatenate(batches)]).to(device)
    parts: tuple[Tensor, ...] = together.split([len(batch) for batch in batches])
    return parts
