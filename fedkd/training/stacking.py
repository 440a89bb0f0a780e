"""Many models of one architecture as one: stacked parameters, buffers and optimizer slots.

A module is written for one model; `torch.func.functional_call` puts a member's tensors in it and
`torch.vmap` runs it for all members at once. Two kinds of layers are exchanged on the way:
BatchNorm, whose statistics must not see padded rows, and linear layers, for speed.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fedkd.inputs import Shape
from fedkd.models.dropout import connect_dropout
from fedkd.models.outside import Outside
from fedkd.randomness import seeded_for
from fedkd.tensors import as_tensor
from fedkd.training.cohort import check_weights
from fedkd.training.gradients import MEASURES, linear_squares
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.state import Arrays, Block, ModelState, at_place, copy_to_numpy

TableT = TypeVar("TableT", np.ndarray, Tensor)


class VmapUnsupportedError(ValueError):
    """A model that cannot be stacked; the text says why."""


@dataclass(slots=True)
class CountedRows:
    """Which rows of the batch count, told to the layers that mix rows.

    Attributes:
        weights: 1 for a row that counts, 0 for padding; None: all count.
        fewest: rows that count in the smallest batch of the cohort's step.
    """

    weights: Float[Tensor, " batch"] | None = None
    fewest: int = 0


class MaskedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose batch statistics are those of the rows that count."""

    def __init__(self, original: nn.modules.batchnorm._BatchNorm, counted: CountedRows) -> None:
        super().__init__(
            original.num_features,
            original.eps,
            original.momentum,
            original.affine,
            original.track_running_stats,
        )
        self.counted = counted
        self._original = (original,)  # in a tuple, so that it is not registered as a part

    def _check_input_dim(self, input: Tensor) -> None:
        self._original[0]._check_input_dim(input)

    def forward(
        self, input: Float[Tensor, "batch channels *positions"]
    ) -> Float[Tensor, "batch channels *positions"]:
        """Normalise each channel; in training also fold its statistics into the running ones."""
        weights = self.counted.weights
        cumulative = self.training and self.track_running_stats and self.momentum is None
        judging = not self.training and self.running_mean is not None
        if judging or (weights is None and not cumulative):
            normalised: Tensor = super().forward(input)
            return normalised
        self._check_input_dim(input)
        positions = prod(input.shape[2:])
        fewest = len(input) if weights is None else self.counted.fewest
        if fewest * positions == 1:
            raise ValueError(
                "Expected more than 1 value per channel when training, got a step of one row"
            )
        if weights is None:
            weights = input.new_ones(len(input))
        per_row = weights.reshape(-1, *[1] * (input.ndim - 1))
        per_channel = (1, -1, *[1] * (input.ndim - 2))
        reduced = [0, *range(2, input.ndim)]
        count = weights.sum() * positions
        mean = (per_row * input).sum(reduced) / count
        centred = input - mean.reshape(per_channel)
        variance = (per_row * centred.square()).sum(reduced) / count
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._update(mean.detach(), (variance * count / (count - 1)).detach())
        normalised = centred * (variance + self.eps).rsqrt().reshape(per_channel)
        if self.affine:
            normalised = normalised * self.weight.reshape(per_channel)
            normalised = normalised + self.bias.reshape(per_channel)
        return normalised

    def _update(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        assert self.running_mean is not None  # noqa: S101
        assert self.running_var is not None  # noqa: S101
        assert self.num_batches_tracked is not None  # noqa: S101
        self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None:
            share = 1.0 / self.num_batches_tracked.to(mean.dtype)
        self.running_mean.copy_((1 - share) * self.running_mean + share * mean)
        self.running_var.copy_((1 - share) * self.running_var + share * variance)


NARROW = 16
"""Outputs below which a linear layer is computed column by column."""


class NarrowLinear(nn.Linear):
    """A linear layer with few outputs, which computes ``(W x^T)^T``.

    Batched matrix products are several times slower where the last dimension is short, and class
    scores then lie side by side, which `fedkd.losses.response` makes use of.
    """

    def forward(self, input: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch outputs"]:
        """Return ``input @ weight.t() + bias``."""
        if input.ndim != 2:
            return F.linear(input, self.weight, self.bias)
        # Flat and back: on the way back this puts the gradient's rows in memory as the input's
        # are; without it the layer before multiplies two layouts, which takes much longer.
        rows = input.flatten().unflatten(0, input.shape)
        output: Tensor = (self.weight @ rows.t()).t()
        return output if self.bias is None else output + self.bias


MEASURES[NarrowLinear] = linear_squares


class Skeleton:
    """A module whose parameters and buffers come from outside, member by member.

    Attributes:
        module: holds no member's tensors.
        trainable: names of what optimizers change; a shared parameter has one name here.
        shapes: of all parameters and buffers of a state, by name.
        first_names: the one name of each parameter, by all its names.
        transposed: names of the weights of wide linear layers, which a stack keeps transposed:
            so a product and its gradient are computed as they lie in memory, without copies.
        dropout: where its dropout layers draw from.
        counted: told to its BatchNorm layers.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, own_code: bool = False) -> None:
        state = module.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.trainable = tuple(name for name, p in module.named_parameters() if p.requires_grad)
        first_name = {id(p): name for name, p in module.named_parameters()}
        self.first_names = {
            name: first_name[id(p)] for name, p in module.named_parameters(remove_duplicate=False)
        }
        self.transposed = frozenset(
            self.first_names[f"{name}.weight"]
            for name, layer in module.named_modules()
            if type(layer) is nn.Linear and layer.out_features >= NARROW and name
        )
        self.counted = CountedRows()
        self.module = _exchange_layers(copy.deepcopy(module), self.counted).to(device)
        self.dropout = connect_dropout(self.module)
        self._own_code = own_code
        self._outside = Outside(self.module) if own_code else None

    def restore(self) -> None:
        """Put back what somebody else's module has left outside the tensors that it was handed."""
        if self._outside is not None:
            self._outside.restore()

    def logits(
        self, tensors: Mapping[str, Tensor], inputs: Float[Tensor, "batch *shape"]
    ) -> Float[Tensor, "batch classes"]:
        """Run the module with one member's tensors; buffers are updated in place."""
        return self.run_at(tensors, "", inputs)

    def run_at(self, tensors: Mapping[str, Tensor], path: str, *inputs: Any) -> Tensor:
        """Run the part of the module at ``path`` with one member's tensors; "" is all of it."""
        prefix = f"{path}." if path else ""
        handed: dict[str, Tensor] = {}
        for name in self.shapes:
            if name.startswith(prefix):
                stored = self.first_names.get(name, name)
                tensor = tensors[stored]
                turned = tensor.t() if stored in self.transposed else tensor
                handed[name.removeprefix(prefix)] = turned
        used = dict(handed)
        part = self.module.get_submodule(path)
        output: Tensor = functional_call(part, used, inputs, tie_weights=False)
        for name, tensor in used.items():
            if tensor is not handed[name]:
                # The module put a new tensor in the place of a buffer instead of changing it.
                handed[name].copy_(tensor.detach())
        return output

    def turned(self, name: str, values: TableT) -> TableT:
        """Return a parameter, buffer or slot as a stack keeps it, or back from there."""
        return values.T if name in self.transposed else values

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the tensors of a stack: each shared parameter once."""
        return tuple(name for name in self.shapes if self.first_names.get(name, name) == name)

    def try_out(self, label: str, shape: Shape) -> None:
        """Run two members for one step, so that what cannot be stacked says so before any work.

        Args:
            label: what the model is called.
            shape: of one row.

        Raises:
            VmapUnsupportedError: naming the model and what went wrong.
        """
        state = self.module.state_dict()
        device = next((tensor.device for tensor in state.values()), torch.device("cpu"))
        tensors = {
            name: torch.stack([state[name].t() if name in self.transposed else state[name]] * 2)
            for name in self.stored
        }
        leaves = [tensors[name].requires_grad_() for name in self.trainable]
        self.module.train()
        try:
            with seeded_for(own_code=self._own_code, seed=0):
                logits_of = torch.vmap(self.logits, randomness="different")
                logits = logits_of(tensors, torch.zeros(2, 2, *shape, device=device))
                torch.autograd.grad(logits.sum(), leaves, allow_unused=True)
        # Somebody else's code may fail in any way; the message must still say which model it was.
        except Exception as error:
            first_line = str(error).strip().split("\n", 1)[0]
            raise VmapUnsupportedError(
                f"model {label!r} cannot be stacked: {type(error).__name__}: {first_line}; "
                "engine.vectorize: loop trains it one client at a time"
            ) from error


def _exchange_layers(module: nn.Module, counted: CountedRows) -> nn.Module:
    exchange: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
        nn.BatchNorm1d: lambda layer: MaskedBatchNorm(layer, counted),
        nn.BatchNorm2d: lambda layer: MaskedBatchNorm(layer, counted),
        nn.BatchNorm3d: lambda layer: MaskedBatchNorm(layer, counted),
        nn.Linear: lambda layer: _narrow(layer) if layer.out_features < NARROW else layer,
    }
    for parent in module.modules():
        for name, child in parent._modules.items():
            # Exact types only: a subclass may do something else.
            if child is not None and type(child) in exchange:
                parent._modules[name] = exchange[type(child)](child)
    return module


def _narrow(layer: nn.Linear) -> NarrowLinear:
    bias = layer.bias is not None
    # On the meta device nothing is drawn for weights that are replaced at once.
    narrow = NarrowLinear(layer.in_features, layer.out_features, bias=bias, device="meta")
    narrow.weight, narrow.bias = layer.weight, layer.bias
    return narrow


def stacked_tensors(
    skeleton: Skeleton, weights: Sequence[Mapping[str, np.ndarray]], device: torch.device
) -> dict[str, Tensor]:
    """Return copies of members' parameters and buffers as one tensor ``[members, ...]`` a name."""
    tensors = {}
    for name in skeleton.stored:
        arrays = [skeleton.turned(name, own[name]) for own in weights]
        # Handed the result, NumPy cannot choose a layout after that of the parts.
        together = np.empty((len(arrays), *arrays[0].shape), arrays[0].dtype)
        tensors[name] = as_tensor(np.stack(arrays, out=together)).to(device)
    return tensors


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbours in a stack that take the same number of steps and have the same slots.

    Attributes:
        start, stop: positions of the members.
        steps: how many steps they take.
        parameters: views of the members' parameters, by name.
    """

    start: int
    stop: int
    steps: int
    parameters: dict[str, nn.Parameter]


@dataclass(slots=True)
class Stack:
    """One model of every member: tensors with the members as first dimension.

    Attributes:
        skeleton: the module.
        tensors: parameters and buffers ``[members, ...]`` by name; weights that the skeleton
            names ``transposed`` are, and so are their slots.
        slots: optimizer slots ``[members, ...]`` by ``<slot>/<parameter>``.
        memory: for each member, which slots it has; a step counter with its value (a scalar),
            the others with None.
    """

    skeleton: Skeleton
    tensors: dict[str, Tensor]
    slots: dict[str, Tensor] = field(default_factory=dict)
    memory: list[dict[str, np.ndarray | None]] = field(default_factory=list)

    @classmethod
    def of(cls, skeleton: Skeleton, states: Sequence[ModelState], device: torch.device) -> "Stack":
        """Copy the members' states in: one by one, or all at once where they lie in one block."""
        block = _one_block(states)
        if block is not None:
            places = [state.home[1] for state in states if state.home is not None]
            return cls._of_block(skeleton, block, places, device)
        for state in states:
            check_weights(state.weights, skeleton.shapes)
        tensors = stacked_tensors(skeleton, [state.weights for state in states], device)
        stack = cls(skeleton, tensors, {}, [{} for _ in states])
        for position, state in enumerate(states):
            # Sorted: members are grouped by what they remember, and a state that was read from a
            # file remembers the same in another order.
            for key, array in sorted(state.optimizer.items()):
                if key.startswith("step/"):
                    stack.memory[position][key] = array
                else:
                    stack.memory[position][key] = None
                    turned = skeleton.turned(key.split("/", 1)[1], array)
                    stack._slot(key)[position].copy_(as_tensor(turned))
        return stack

    @classmethod
    def _of_block(
        cls, skeleton: Skeleton, block: Block, places: Sequence[int], device: torch.device
    ) -> "Stack":
        """Copy the members at these places of a block in."""
        check_weights(at_place(block.weights, 0), skeleton.shapes)
        everybody = list(places) == list(range(len(block.memory)))

        def copied(name: str, array: np.ndarray) -> Tensor:
            tensor = as_tensor(array if everybody else array[places])
            if name in skeleton.transposed:
                tensor = tensor.transpose(1, 2)
            return tensor.to(device, copy=True, memory_format=torch.contiguous_format)

        tensors = {name: copied(name, block.weights[name]) for name in skeleton.stored}
        slots = {key: copied(key.split("/", 1)[1], array) for key, array in block.slots.items()}
        return cls(skeleton, tensors, slots, [dict(block.memory[place]) for place in places])

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The tensors that no optimizer changes and that are no parameters, by name."""
        module = self.skeleton.module
        own = {
            name: tensor
            for name, tensor in self.tensors.items()
            if name not in self.skeleton.first_names
        }
        # Those outside of its state are in the module itself, one for all members.
        return {**{name: each for name, each in module.named_buffers() if name not in own}, **own}

    def _slot(self, key: str) -> Tensor:
        if key not in self.slots:
            _, name = key.split("/", 1)
            self.slots[key] = torch.zeros_like(self.tensors[name])
        return self.slots[key]

    def load_weights(self, weights: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Give each member its parameters and buffers."""
        if all(own is weights[0] for own in weights):
            check_weights(weights[0], self.skeleton.shapes)
            for name, tensor in self.tensors.items():
                tensor.copy_(as_tensor(self.skeleton.turned(name, weights[0][name])))
            return
        for own in weights:
            check_weights(own, self.skeleton.shapes)
        for name, tensor in self.tensors.items():
            for member, own in zip(tensor, weights, strict=True):
                member.copy_(as_tensor(self.skeleton.turned(name, own[name])))

    def rearrange(self, ranks: Sequence[int]) -> None:
        """Give the members other places: those at ``ranks``, in that order."""
        order = list(ranks)
        self.tensors = {name: tensor[order] for name, tensor in self.tensors.items()}
        self.slots = {key: slot[order] for key, slot in self.slots.items()}
        self.memory = [self.memory[at] for at in order]

    def forget(self) -> None:
        """Drop all optimizer slots."""
        self.memory = [{} for _ in self.memory]

    def weights(self) -> list[Arrays]:
        """Return a copy of every member's parameters and buffers, in the order of the stack."""
        together = self._all_weights()
        return [at_place(together, place) for place in range(len(self.memory))]

    def weights_of(self, tensors: Mapping[str, Tensor], position: int) -> Arrays:
        """Return a copy of a member's part of tensors that lie as those of this stack do."""
        own = {name: self._copy(name, tensor[position]) for name, tensor in tensors.items()}
        return self._by_all_names(own)

    def states(self) -> list[ModelState]:
        """Return a copy of every member's weights and slots, in the order of the stack."""
        kept = {key for memory in self.memory for key, step in memory.items() if step is None}
        slots = {
            key: self._copy_all(key.split("/", 1)[1], slot)
            for key, slot in self.slots.items()
            if key in kept
        }
        return Block(self._all_weights(), slots, self.memory).states()

    def _all_weights(self) -> Arrays:
        return self._by_all_names(
            {name: self._copy_all(name, tensor) for name, tensor in self.tensors.items()}
        )

    def _by_all_names(self, own: Arrays) -> Arrays:
        first_names = self.skeleton.first_names
        return {name: own[first_names.get(name, name)] for name in self.skeleton.shapes}

    def _copy_all(self, name: str, tensor: Tensor) -> np.ndarray:
        turned = tensor.transpose(1, 2) if name in self.skeleton.transposed else tensor
        return copy_to_numpy(turned)

    def _copy(self, name: str, tensor: Tensor) -> np.ndarray:
        return copy_to_numpy(tensor.t() if name in self.skeleton.transposed else tensor)


def _one_block(states: Sequence[ModelState]) -> Block | None:
    """Return the block that all these states lie in; None where they do not."""
    home = states[0].home if states else None
    if home is None:
        return None
    block = home[0]
    together = all(state.home is not None and state.home[0] is block for state in states)
    return block if together and all(map(block.holds, states)) else None


class StackedOptimizer:
    """One optimizer for a stack: per-member step counters, slots and learning rates.

    torch's optimizers work element by element, so one tensor of many members is updated as the
    members alone would be, except for the step counter of a parameter. Members are therefore
    grouped by their counters and by how many steps they take; a group without a gradient rests.

    Args:
        stack: what it updates.
        settings: which optimizer.
        steps: how many steps each member takes.
        runs: which members take their steps together, by a number for each; None: all.
        passing: whether it begins without memory and leaves none: what the stack's members
            remember stays as it is.
    """

    def __init__(
        self,
        stack: Stack,
        settings: OptimizerSettings,
        steps: Sequence[int],
        *,
        runs: Sequence[int] | None = None,
        passing: bool = False,
    ) -> None:
        self._stack = stack
        self._settings = settings
        self._passing = passing
        self._memory = [{} for _ in stack.memory] if passing else stack.memory
        self._groups: list[_Group] = []
        keys = [
            (
                run,
                count,
                sorted((key, -1.0 if s is None else float(s)) for key, s in memory.items()),
            )
            for run, count, memory in zip(
                runs or [0] * len(steps), steps, self._memory, strict=True
            )
        ]
        start = 0
        for (_, count, _), members in groupby(keys):
            stop = start + len(list(members))
            parameters = {
                name: nn.Parameter(stack.tensors[name][start:stop])
                for name in stack.skeleton.trainable
            }
            self._groups.append(_Group(start, stop, count, parameters))
            start = stop
        # Where the learning rate follows the run, members with other steps are elsewhere in it.
        self._steps: list[int] = []
        tables: list[dict[str, Any]] = []
        for group in self._groups:
            if not tables or not (settings.constant or group.steps == self._steps[-1]):
                tables.append({"params": [], "lr": settings.learning_rate(0.0)})
                self._steps.append(group.steps)
            tables[-1]["params"].extend(group.parameters.values())
        self._optimizer = settings.build(tables, fused=True)
        for group in self._groups:
            self._lend_slots(group)

    def _lend_slots(self, group: _Group) -> None:
        for key, step in self._memory[group.start].items():
            slot, name = key.split("/", 1)
            parameter = group.parameters[name]
            if step is None:
                value = self._stack.slots[key][group.start : group.stop]
            else:
                value = torch.tensor(step, device=self._optimizer.counts_on(parameter))
            self._optimizer.state[parameter][slot] = value

    def set_learning_rates(self, progress: Callable[[int], float]) -> None:
        """Set what is in force at ``progress`` of a member that takes so many steps."""
        if self._settings.constant:
            return
        for table, steps in zip(self._optimizer.param_groups, self._steps, strict=True):
            table["lr"] = self._settings.learning_rate(progress(steps))

    def step(self, gradients: Mapping[str, Tensor | None], first: int, active: int) -> None:
        """Update ``active`` members from place ``first`` on with gradients ``[active, ...]``."""
        for group in self._groups:
            resting = not first <= group.start < first + active
            for name, parameter in group.parameters.items():
                gradient = None if resting else gradients[name]
                if gradient is not None:
                    gradient = gradient[group.start - first : group.stop - first]
                parameter.grad = gradient
        self._optimizer.step()

    def give_back(self) -> None:
        """Write the slots that this optimizer made into the stack."""
        if self._passing:
            return
        for group in self._groups:
            memory: dict[str, np.ndarray | None] = {}
            for name, parameter in group.parameters.items():
                for slot, value in self._optimizer.state.get(parameter, {}).items():
                    if not isinstance(value, Tensor):
                        continue
                    key = f"{slot}/{name}"
                    if slot == "step":
                        memory[key] = copy_to_numpy(value)
                        continue
                    memory[key] = None
                    own = self._stack._slot(key)[group.start : group.stop]
                    if own.data_ptr() != value.data_ptr():
                        own.copy_(value)
            for position in range(group.start, group.stop):
                self._stack.memory[position] = memory
