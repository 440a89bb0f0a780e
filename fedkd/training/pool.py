"""The models a worker keeps at hand, and the states that clients start from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.models import ModelSettings, build_model
from fedkd.models.dropout import connect_dropout
from fedkd.models.outside import Outside
from fedkd.objectives.taps import head_layer, layer_shapes, resolved_layer
from fedkd.randomness import Purpose, seeded_for, torch_seed_for
from fedkd.tensors import as_tensor
from fedkd.training.binding import BoundLearners
from fedkd.training.cohort import (
    PARTS,
    Architecture,
    Member,
    TrainingData,
    check_weights,
    named_models,
)
from fedkd.training.gradients import Method
from fedkd.training.learners import ComposedObjective
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parts import FitParts
from fedkd.training.private import check_module, method_of
from fedkd.training.stacking import Skeleton
from fedkd.training.state import Arrays, ClientState, ModelState, copy_to_numpy, to_arrays

PREDICT_ROWS = 1024
"""Rows that one model predicts at once; fixed, for a product's width may change its last bit."""


NO_WEIGHTS: Mapping[str, Arrays] = MappingProxyType({})


class Slot:
    """One model and its optimizer, reused for client after client.

    Args:
        module: the model.
        optimizer: of its parameters.
        device: where it trains.
        own_code: whether it is somebody else's model, which may keep things outside its state.
        channels_last: whether its convolutions keep the channels of a pixel side by side in
            memory. States are the same either way: each weight in the order of its dimensions.

    Attributes:
        tensors: its parameters and buffers by name, without gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerSettings,
        device: torch.device,
        *,
        own_code: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.module = module.to(device)
        if channels_last and device.type == "cpu":
            # torch's types do not list it.
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dropout = connect_dropout(self.module)
        self.outside = Outside(self.module) if own_code else None
        self._parameters = dict(self.module.named_parameters())
        first_name = {id(each): name for name, each in self._parameters.items()}
        self._firsts = {
            name: first_name[id(each)]
            for name, each in self.module.named_parameters(remove_duplicate=False)
        }
        self.optimizer = optimizer.build(self._parameters.values(), fused=True)
        self.tensors: dict[str, Tensor] = {
            name: tensor.detach() for name, tensor in self.module.state_dict().items()
        }
        self._buffers = [
            (owner, name, buffer)
            for owner in self.module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def learnt_by_name(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: each for name, each in self._parameters.items() if each.requires_grad}

    @property
    def learnt(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return list(self.learnt_by_name.values())

    def by_all_names(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return other weights in the place of its own by all names of each: some have several."""
        return {name: weights[first] for name, first in self._firsts.items() if first in weights}

    @contextmanager
    def with_optimizer(self, settings: OptimizerSettings | None) -> Iterator[None]:
        """Train by another optimizer inside the block: fresh, and forgotten after it."""
        if settings is None:
            yield
            return
        own = self.optimizer
        self.optimizer = settings.build(self._parameters.values(), fused=True)
        try:
            yield
        finally:
            self.optimizer = own

    def load(self, state: ModelState) -> None:
        """Copy a model's weights and its optimizer's slots in; nothing of the last one stays."""
        if self.outside is not None:
            self.outside.restore()
        self.load_weights(state.weights)
        self.optimizer.state.clear()
        for key, array in state.optimizer.items():
            slot, name = key.split("/", 1)
            parameter = self._parameters[name]
            value = as_tensor(array)
            if slot == "step":
                value = value.to(self.optimizer.counts_on(parameter), copy=True)
            else:
                value = torch.empty_like(parameter, requires_grad=False).copy_(value)
            self.optimizer.state[parameter][slot] = value

    def load_weights(self, weights: Mapping[str, np.ndarray]) -> None:
        """Copy parameters and buffers in."""
        check_weights(weights, self._shapes)
        for owner, name, buffer in self._buffers:
            # What the last client's call left there, perhaps because it failed.
            owner._buffers[name] = buffer
        with torch.no_grad():
            for name, array in weights.items():
                self.tensors[name].copy_(as_tensor(array))

    def keep_buffers(self) -> None:
        """Copy back what the module computed into new tensors instead of its buffers."""
        for owner, name, buffer in self._buffers:
            computed = owner._buffers[name]
            if computed is not None and computed is not buffer:
                buffer.copy_(computed.detach())
                owner._buffers[name] = buffer

    def weights(self) -> Arrays:
        """Return a copy of parameters and buffers."""
        return to_arrays(self.tensors)

    def state(self) -> ModelState:
        """Return a copy of weights and optimizer slots."""
        slots = {
            f"{slot}/{name}": copy_to_numpy(value)
            for name, parameter in self._parameters.items()
            for slot, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        return ModelState(weights=self.weights(), optimizer=slots)


class ModelPool:
    """The models a worker keeps at hand, so that no call has to build one.

    What is in a slot between calls never matters: every call loads its clients' states first.
    """

    def __init__(
        self,
        data: TrainingData,
        optimizer: OptimizerSettings,
        first_weights: Mapping[str, Arrays] = NO_WEIGHTS,
    ) -> None:
        """Keep nothing yet.

        Args:
            data: that models fit.
            optimizer: of them.
            first_weights: what models start from, by `ModelSettings.key`, in the place of what
                their seeds give.
        """
        self._first_weights = first_weights
        self._data = data
        self._optimizer = optimizer
        self._device = data.train_inputs.device
        self._slots: dict[tuple[str, str], list[Slot]] = {}
        self._skeletons: dict[str, Skeleton] = {}
        self._frozen: dict[str, nn.Module] = {}
        self._frozen_skeletons: dict[str, Skeleton] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._heads: dict[str, str] = {}
        self._methods: dict[str, Method] = {}
        self._bound: dict[str, BoundLearners] = {}
        self._parts: dict[str, Slot] = {}
        self._parts_skeletons: dict[str, Skeleton] = {}

    def slots(self, name: str, model: ModelSettings, count: int) -> list[Slot]:
        """Return ``count`` slots of a model by its name, the caller's until the next call."""
        slots = self._slots.setdefault((name, model.key), [])
        while len(slots) < count:
            self.take_in(name, model, self.build(model, seed=0))
        return slots[:count]

    def take_in(self, name: str, model: ModelSettings, module: nn.Module) -> None:
        """Keep a module at hand as one more slot of a model."""
        slot = Slot(
            module,
            self._optimizer,
            self._device,
            own_code=model.is_own,
            channels_last=model.channels_last,
        )
        self._slots.setdefault((name, model.key), []).append(slot)

    def skeleton(self, model: ModelSettings) -> Skeleton:
        """Return what stacks a model; tried on two members when it is made.

        Raises:
            VmapUnsupportedError: if the model cannot be stacked.
        """
        if model.key not in self._skeletons:
            skeleton = Skeleton(self.build(model, seed=0), self._device, own_code=model.is_own)
            skeleton.try_out(model.label, self._data.input_shape)
            self._skeletons[model.key] = skeleton
        self._skeletons[model.key].restore()
        return self._skeletons[model.key]

    def frozen_module(self, model: ModelSettings) -> nn.Module:
        """Return a module whose tensors come from outside; in evaluation mode, without gradients.

        One for all models of an architecture that never train.
        """
        if model.key not in self._frozen:
            module = self.build(model, seed=0).to(self._device)
            self._frozen[model.key] = module.requires_grad_(False)
        return self._frozen[model.key].eval()

    def frozen_skeleton(self, model: ModelSettings) -> Skeleton:
        """Return the same for stacked members."""
        if model.key not in self._frozen_skeletons:
            module = self.build(model, seed=0)
            skeleton = Skeleton(module, self._device, own_code=model.is_own)
            skeleton.module.requires_grad_(False)
            self._frozen_skeletons[model.key] = skeleton
        self._frozen_skeletons[model.key].module.eval()
        return self._frozen_skeletons[model.key]

    def layer_shapes(self, model: ModelSettings) -> dict[str, tuple[int, ...]]:
        """Return the shape, without the rows, of what each layer of a model puts out."""
        if model.key not in self._shapes:
            module = self.build(model, seed=0).to(self._device)
            self._shapes[model.key] = layer_shapes(module, self._data.train_inputs[:2])
        return self._shapes[model.key]

    def layer_paths(self, model: ModelSettings, layers: Sequence[str]) -> dict[str, str]:
        """Return what `tapped` calls these layers of a model, by the names they were asked for.

        Raises:
            ValueError: naming a layer that the model does not have, and those that it has.
        """
        shapes = self.layer_shapes(model) if layers else {}
        return {layer: resolved_layer(layer, shapes, whose=model.label) for layer in layers}

    def private_method(self, name: str, model: ModelSettings) -> Method:
        """Return how the gradients of a model's rows are clipped where it learns with privacy.

        Args:
            name: of the model.
            model: its architecture.

        Raises:
            PrivacyError: naming a layer that would tell of private rows.
        """
        if model.key not in self._methods:
            module = self.build(model, seed=0).to(self._device)
            inputs = torch.zeros_like(self._data.train_inputs[:2])
            with seeded_for(own_code=model.is_own, seed=0):
                check_module(name, module, inputs)
                self._methods[model.key] = method_of(module, inputs, own_code=model.is_own)
        return self._methods[model.key]

    def head(self, model: ModelSettings) -> str:
        """Return the module path of a model's head.

        Raises:
            ValueError: if it cannot be told apart.
        """
        if model.key not in self._heads:
            module = self.build(model, seed=0).to(self._device)
            inputs = self._data.train_inputs[:2]
            self._heads[model.key] = head_layer(module, inputs, whose=model.label)
        return self._heads[model.key]

    def slot_of(self, parts: FitParts) -> Slot:
        """Return a slot of a fit's own parts."""
        return Slot(parts.parts, self._optimizer, self._device)

    def bound(
        self, composed: ComposedObjective, models: Mapping[str, ModelSettings]
    ) -> BoundLearners:
        """Return an objective bound to models by name.

        Raises:
            ValueError: if they do not fit; the message names the setting.
        """
        key = _bound_key(composed, models)
        if key not in self._bound:
            modules = {
                name: self.build(models[name], seed=0).to(self._device) for name in composed.models
            }
            self._bound[key] = BoundLearners(
                composed,
                modules,
                self._data.train_inputs[:2],
                num_classes=self._data.num_classes,
                # A row's id is its place among the private or among the public rows.
                rows=max(len(self._data.train_inputs), len(self._data.public_inputs)),
            )
        return self._bound[key]

    def parts_slot(
        self, composed: ComposedObjective, models: Mapping[str, ModelSettings]
    ) -> Slot | None:
        """Return the one slot of an objective's parts; None where it has none."""
        key, bound = _bound_key(composed, models), self.bound(composed, models)
        if not len(bound.parts):
            return None
        if key not in self._parts:
            self._parts[key] = Slot(bound.parts, self._optimizer, self._device)
        return self._parts[key]

    def parts_skeleton(
        self, composed: ComposedObjective, models: Mapping[str, ModelSettings]
    ) -> Skeleton | None:
        """Return what stacks an objective's parts; None where it has none."""
        key, bound = _bound_key(composed, models), self.bound(composed, models)
        if not len(bound.parts):
            return None
        if key not in self._parts_skeletons:
            self._parts_skeletons[key] = Skeleton(bound.parts, self._device)
        return self._parts_skeletons[key]

    def initial_state(self, architecture: Architecture, seed: int) -> ClientState:
        """Return fresh models' state.

        The first of them has the weights that were given for it; else the seed decides.
        """
        return ClientState(
            {
                name: ModelState(weights=self._initial_weights(model, seed, position))
                for position, (name, model) in enumerate(named_models(architecture).items())
            }
        )

    def _initial_weights(self, model: ModelSettings, seed: int, position: int) -> Arrays:
        if not position and model.key in self._first_weights:
            return {name: each.copy() for name, each in self._first_weights[model.key].items()}
        if position:
            # Peers of one architecture must not start as copies of each other.
            seed = torch_seed_for(seed, Purpose.MODEL, position)
        tensors = self.build(model, seed).state_dict()
        return to_arrays(tensors)

    def build(self, model: ModelSettings, seed: int) -> nn.Module:
        """Return a fresh network that fits the data, on the CPU."""
        return build_model(
            model,
            input_shape=self._data.input_shape,
            num_classes=self._data.num_classes,
            seed=seed,
        )


def states_of(
    members: Sequence[Member], architecture: Architecture, pool: ModelPool, seed: int
) -> list[ClientState]:
    """Return each member's state, fresh where it has none yet.

    Raises:
        ValueError: if a state holds other models than the architecture names.
    """
    names = named_models(architecture).keys()
    states = []
    for member in members:
        state = member.state
        if state is None:
            state = pool.initial_state(architecture, initial_model_seed(seed, member.client))
        elif state.models.keys() - {PARTS} != names:
            raise ValueError(
                f"state of client {member.client} has the models {sorted(state.models)}, "
                f"the cohort trains {sorted(names)}"
            )
        states.append(state)
    return states


def parts_of(
    bound: BoundLearners | FitParts, state: ModelState | None, seed: int, client: int
) -> ModelState:
    """Return the parts that a client has of an objective, fresh where it has none yet.

    Args:
        bound: the objective, or the parts of a fit.
        state: all parts of the client, also those of other objectives.
        seed: the run's.
        client: partition id.
    """
    names = bound.parts.state_dict().keys()
    known = {} if state is None else state.weights
    if names <= known.keys():
        weights = {name: known[name] for name in names}
    else:
        fresh = bound.initial_parts(initial_model_seed(seed, client))
        weights = {name: known.get(name, array) for name, array in fresh.items()}
    slots = {} if state is None else state.optimizer
    return ModelState(
        weights, {key: array for key, array in slots.items() if key.split("/", 1)[1] in names}
    )


def with_parts(state: ModelState | None, changed: ModelState) -> ModelState:
    """Return all parts of a client after those of one objective have changed."""
    if state is None:
        return changed
    return ModelState(
        {**state.weights, **changed.weights}, {**state.optimizer, **changed.optimizer}
    )


def _bound_key(composed: ComposedObjective, models: Mapping[str, ModelSettings]) -> str:
    return "; ".join([composed.key, *(f"{name}={models[name].key}" for name in composed.models)])


def initial_model_seed(seed: int, client: int) -> int:
    """Return the seed of a client's first weights: the same in every arm of a study."""
    return torch_seed_for(seed, Purpose.MODEL, client)
