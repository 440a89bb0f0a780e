"""A trial of a model of one's own: a few steps before anything starts, on a few real rows.

What a user's code does cannot be read off it, so it is watched: built twice with one seed and once
with another, trained for two steps, judged, handed on through its state, and used again as a worker
uses it for the next client. What would stop every client in the first round is refused here by
name, and so is what would make numbers depend on who was in a worker before.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd.models import ModelSettings
from fedkd.models.outside import Outside
from fedkd.randomness import seeded_everything
from fedkd.threads import computing_threads
from fedkd.training.batches import Passes
from fedkd.training.cohort import MODEL, Member, Streams, TrainingData
from fedkd.training.feeds import FitKeys
from fedkd.training.loop import LoopCohort
from fedkd.training.objectives import supervised
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.pool import ModelPool
from fedkd.training.stacking import VmapUnsupportedError
from fedkd.training.state import ClientState, ModelState, copy_to_numpy, to_arrays
from fedkd.training.vmap import VmapCohort

MOST_ROWS = 4
"""Rows of the smaller of two steps: more would show nothing more."""

SAME = 1e-3
"""Difference of two losses up to which a stack computes what one client alone does."""

SUM_TOLERANCE = 1e-3
"""By how much the sum of a distribution may miss 1."""

TYPES = {
    torch.float16,
    torch.float32,
    torch.float64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
}
"""What a state may hold: NumPy has it, and it has a mean."""


class TrialSettings(NamedTuple):
    """How a model is going to be used.

    Attributes:
        optimizer: of its training.
        fewest_rows: rows of the smallest step that it will take.
        trains: whether it trains at all.
        stacked: whether it has to train stacked with others.
    """

    optimizer: OptimizerSettings
    fewest_rows: int = 2
    trains: bool = True
    stacked: bool = False


def try_model(
    model: ModelSettings,
    rows: tuple[Tensor, Tensor],
    *,
    num_classes: int,
    use: TrialSettings,
    vocabulary: int | None = None,
) -> None:
    """Try a model of one's own; built-in ones are known to pass and are not tried.

    Args:
        model: what to build.
        rows: some inputs and their labels; a handful is enough.
        num_classes: logits a row.
        use: how it is going to be used.
        vocabulary: tokens of texts; None for other inputs.

    Raises:
        ValueError: naming the model, what it does and what would work.
    """
    if not model.is_own:
        return
    # With one thread, as workers compute.
    with warnings.catch_warnings(), computing_threads(1), _unchanged_process(model.label):
        # Not a place to see the warnings of somebody else's code for the first time of many.
        warnings.simplefilter("ignore")
        _Trial(model, rows, num_classes, use, vocabulary).run()


class ModelTrialError(ValueError):
    """A model that cannot be used; the text says why and what would work."""


class SingleRowError(ModelTrialError):
    """A model that cannot train on a single row."""


class _Trial:
    def __init__(
        self,
        model: ModelSettings,
        rows: tuple[Tensor, Tensor],
        num_classes: int,
        use: TrialSettings,
        vocabulary: int | None,
    ) -> None:
        self._model, self._use, self._num_classes = model, use, num_classes
        self._small = max(2, min(use.fewest_rows, MOST_ROWS))
        count = 2 * self._small + 1
        inputs, labels = (
            part.cpu()[torch.arange(count) % len(part)] if len(part) else part.cpu()
            for part in rows
        )
        self._data = TrainingData(
            train_inputs=inputs,
            train_labels=labels,
            public_inputs=inputs[:0],
            public_labels=None,
            num_classes=num_classes,
            vocabulary=vocabulary,
        )

    def _bad(self, what: str) -> ModelTrialError:
        return ModelTrialError(f"model {self._model.label!r} {what}")

    def run(self) -> None:
        pool = self._pool()
        first, again, other = (pool.build(self._model, seed) for seed in (1, 1, 2))
        self._check_state(first)
        self._check_first_weights(first, again, other)
        self._try_outputs(again)
        if self._use.trains:
            with self._named("failed in a training step"):
                self._compare_cohorts(first, other)
            if self._use.stacked:
                self._try_stack()

    def _pool(self) -> ModelPool:
        return ModelPool(self._data, self._use.optimizer)

    # -- what it is ------------------------------------------------------------------------

    def _check_state(self, module: nn.Module) -> None:
        state = module.state_dict()
        for name, entry in state.items():
            if not isinstance(entry, Tensor):
                raise self._bad(
                    f"keeps {name!r} in its state_dict as {type(entry).__name__}: only tensors "
                    "travel, so make it a buffer or leave it out of get_extra_state"
                )
            if nn.parameter.is_lazy(entry):
                raise self._bad(f"has a lazy layer whose {name!r} no forward pass has made")
            if entry.dtype not in TYPES or entry.layout != torch.strided:
                raise self._bad(
                    f"keeps {name!r} as {_type_name(entry)}, which has no place in NumPy or no "
                    "mean: use float32, for example model.float()"
                )
        missing = [name for name, _ in module.named_parameters() if name not in state]
        if missing:
            raise self._bad(f"leaves {missing[0]!r} out of its state_dict, so it could not travel")
        for name, parameter in module.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self._bad(f"has NaN or infinity in its first {name!r}")
        if self._use.trains and not any(p.requires_grad for p in module.parameters()):
            raise self._bad("has no parameter that requires a gradient: there is nothing to train")

    def _check_first_weights(self, first: nn.Module, again: nn.Module, other: nn.Module) -> None:
        one, two, three = (each.state_dict() for each in (first, again, other))
        for name, tensor in one.items():
            if name not in two or not _same_bits(tensor, two[name]):
                raise self._bad(
                    f"has another first {name!r} each time it is built with one seed: it draws "
                    "from a generator that no seed reaches; draw from torch's, Python's or "
                    "NumPy's global one"
                )
        layout = {name: (tuple(t.shape), t.dtype) for name, t in one.items()}
        if layout != {name: (tuple(t.shape), t.dtype) for name, t in three.items()}:
            raise self._bad("has other layers for another seed")

    # -- what it puts out ------------------------------------------------------------------

    def _try_outputs(self, module: nn.Module) -> None:
        inputs, labels = self._data.train_inputs, self._data.train_labels
        module.eval()
        with torch.no_grad():
            logits = self._logits(module, inputs, "in evaluation mode")
        sums = logits.double().sum(-1)
        if bool(logits.min() >= 0) and bool(((sums - 1).abs() < SUM_TOLERANCE).all()):
            raise self._bad(
                "returns probabilities, every row of which sums to 1: return logits, without a "
                "softmax at the end"
            )
        if not self._use.trains:
            return
        before = _layout(module)
        parameters = dict(module.named_parameters())
        module.train()
        for rows in (self._small + 1, self._small):
            logits = self._logits(module, inputs[:rows], "in training mode")
            loss = F.cross_entropy(logits, labels[:rows])
            self._doing(loss.backward, f"in a backward pass over {rows} rows")
        self._check_gradients(module)
        if self._use.fewest_rows < 2:
            try:
                self._logits(module, inputs[:1], "in training mode")
            except ModelTrialError as error:
                raise SingleRowError(
                    f"model {self._model.label!r} cannot train on a single row "
                    f"({_first_line(error.__cause__ or error)})"
                ) from error
        after = _layout(module)
        for name in sorted(before.keys() | after.keys()):
            if name not in before:
                raise self._bad(
                    f"has {name!r} in its state_dict only once it has trained: register it with "
                    "its shape when the model is built"
                )
            if before[name] != after.get(name):
                told = "is gone" if name not in after else f"has become {after[name]}"
                raise self._bad(
                    f"changes its state_dict while it trains: {name!r} was {before[name]} and "
                    f"{told}; what follows the batch belongs into no buffer"
                )
        for name, parameter in module.named_parameters():
            if parameter is not parameters.get(name):
                raise self._bad(f"puts a new parameter in the place of {name!r} while it trains")

    def _logits(self, module: nn.Module, inputs: Tensor, mode: str) -> Tensor:
        shape = list(inputs.shape)
        logits = self._doing(lambda: module(inputs), f"on inputs of shape {shape} {mode}")
        if not isinstance(logits, Tensor):
            raise self._bad(
                f"must return a tensor of logits, got {type(logits).__name__} {mode}: return the "
                "class scores alone"
            )
        wanted = (len(inputs), self._num_classes)
        if (
            tuple(logits.shape) != wanted
            or logits.dtype not in TYPES
            or not logits.is_floating_point()
        ):
            raise self._bad(
                f"must map {shape} to floating-point logits {list(wanted)}, got "
                f"{_type_name(logits)} of shape {list(logits.shape)} {mode}"
            )
        if not bool(logits.isfinite().all()):
            raise self._bad(f"returns NaN or infinity for its first inputs {mode}")
        return logits

    def _check_gradients(self, module: nn.Module) -> None:
        gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        if not gradients:
            raise self._bad("sends no gradient to any of its parameters")
        for name, gradient in gradients.items():
            if not bool(gradient.isfinite().all()):
                raise self._bad(f"has NaN or infinity in the first gradient of {name!r}")

    def _doing(self, what: Callable[[], Any], where: str) -> Any:
        with self._named(f"failed {where}"), seeded_everything(0):
            return what()

    # -- what it leaves behind -------------------------------------------------------------

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except ModelTrialError:
            raise
        # Somebody else's code may fail in any way; the message must still say which model it was.
        except Exception as error:
            raise self._bad(f"{what}: {_first_line(error)}") from error

    def _compare_cohorts(self, first: nn.Module, other: nn.Module) -> None:
        here, there = self._pool(), self._pool()
        weights = to_arrays(first.state_dict())
        initial = ClientState({MODEL: ModelState(weights)})
        here.take_in(MODEL, self._model, first)
        there.take_in(MODEL, self._model, other)
        used, fresh = self._cohort(here, initial), self._cohort(there, initial)
        trained, told = used.train(), used.predict(self._data.train_inputs)
        for name, array in trained.models[MODEL].weights.items():
            if name in dict(used.module.named_parameters()) and not np.isfinite(array).all():
                raise self._bad(
                    f"has NaN or infinity in {name!r} after two steps of the optimizer "
                    f"(lr {self._use.optimizer.lr:g})"
                )
        if not _same(trained, fresh.train()) or not _equal(
            told, fresh.predict(self._data.train_inputs)
        ):
            apart = used.outside.differences(fresh.outside)
            if apart:
                raise self._bad(
                    f"draws {apart[0]!r} when it is built and keeps it outside its state_dict, "
                    "where no client has its own: register it as a buffer"
                )
            raise self._bad(
                "does not compute the same numbers twice from one seed: it draws from a generator "
                "that no seed reaches (draw from torch's, Python's or NumPy's global one), or "
                "keeps something in a class or in its file"
            )
        # What a client carries from call to call is its state; the module is somebody else's then.
        carried = self._cohort(there, trained)
        same = _equal(told, carried.predict(self._data.train_inputs))
        outside = used.outside.changes()
        if same:
            same = _same(used.train(), carried.train())
        if not same:
            raise self._bad(
                "keeps something outside its state_dict that changes what it computes"
                + (f" ({', '.join(map(repr, outside[:3]))})" if outside else "")
                + ": it would be lost, or go from client to client; register it as a buffer"
            )
        if not _same(trained, self._cohort(here, initial).train()):
            raise self._bad(
                "keeps something that cannot be put back when a worker turns to the next client"
                + (f" ({', '.join(map(repr, outside[:3]))})" if outside else "")
                + ": register it as a buffer"
            )

    def _cohort(self, pool: ModelPool, state: ClientState) -> "_Watched":
        rows = np.arange(len(self._data.train_inputs))
        return _Watched(
            [Member(0, rows, state)],
            model=self._model,
            optimizer=self._use.optimizer,
            data=self._data,
            pool=pool,
            streams=Streams(seed=0),
        )

    def _try_stack(self) -> None:
        """Train two clients as a stack, one with fewer rows, and compare with one after the other.

        Where the model draws numbers, a stack draws others: then only what fails is found.
        """
        pool = self._pool()
        every = np.arange(len(self._data.train_inputs))
        members = [
            Member(client, every[: len(every) - client], pool.initial_state(self._model, 1))
            for client in range(2)
        ]
        found = {}
        for name, kind, round in (
            ("loop", LoopCohort, 1),
            ("other draws", LoopCohort, 2),
            ("vmap", VmapCohort, 1),
        ):
            cohort = kind(
                members,
                model=self._model,
                optimizer=self._use.optimizer,
                data=self._data,
                pool=pool,
                streams=Streams(seed=0, round=round),
            )
            whole = Passes(batch_size=len(every))
            try:
                cohort.fit(supervised, private=whole)
                cohort.predict(self._data.train_inputs)
                cohort.states()
            except VmapUnsupportedError:
                raise
            except Exception as error:
                raise VmapUnsupportedError(
                    f"model {self._model.label!r} cannot be stacked: {_first_line(error)}; "
                    "engine.vectorize: loop trains it one client at a time"
                ) from error
            found[name] = np.array([each["loss/ce"] for each in cohort.metrics()])
        draws = not np.allclose(found["loop"], found["other draws"], rtol=SAME, atol=SAME)
        if not draws and not np.allclose(found["loop"], found["vmap"], rtol=SAME, atol=SAME):
            raise VmapUnsupportedError(
                f"model {self._model.label!r} computes other numbers stacked than alone: it looks "
                "at the batch as a whole, where rows that pad a stack's batches take part; "
                "engine.vectorize: loop trains it one client at a time"
            )


class _Watched(LoopCohort):
    """A cohort of one whose module can be looked at."""

    @property
    def module(self) -> nn.Module:
        return self._slots[MODEL][0].module

    @property
    def outside(self) -> Outside:
        outside = self._slots[MODEL][0].outside
        assert outside is not None  # noqa: S101
        return outside

    def train(self) -> ClientState:
        """Take two steps, with the draws of a call's first fit, and return the state."""
        self._fit_keys = FitKeys(self._streams)
        rows = len(self._data.train_inputs)
        self.fit(supervised, private=Passes(batch_size=rows // 2 + 1))
        return self.states()[0]


def _same(one: ClientState, other: ClientState) -> bool:
    first, second = one.to_arrays(), other.to_arrays()
    return first.keys() == second.keys() and all(
        _equal(array, second[name]) for name, array in first.items()
    )


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare bits: NaN equals itself."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and _equal(copy_to_numpy(one), copy_to_numpy(other))


def _layout(module: nn.Module) -> dict[str, str]:
    return {
        name: f"{_type_name(tensor)} of shape {list(tensor.shape)}"
        for name, tensor in module.state_dict().items()
    }


def _type_name(tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return name if tensor.layout == torch.strided else f"{tensor.layout} {name}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# -- settings of the whole process -------------------------------------------------------------

_PROCESS: Mapping[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_default_device": (torch.get_default_device, torch.set_default_device),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.use_deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "torch.set_float32_matmul_precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch.autograd.set_detect_anomaly": (
        torch.is_anomaly_enabled,
        torch.autograd.set_detect_anomaly,
    ),
}
"""What a model could change for every other one, by the function that does so."""


@contextmanager
def _unchanged_process(label: str) -> Iterator[None]:
    """Refuse a model that changes settings of the whole process; they are put back."""
    before = {name: read() for name, (read, _) in _PROCESS.items()}
    changed = []
    try:
        yield
    finally:
        for name, (read, write) in _PROCESS.items():
            if read() != before[name]:
                changed.append(f"{name} from {before[name]} to {read()}")
                write(before[name])
        if changed:
            raise ModelTrialError(
                f"model {label!r} changes {changed[0]} for everything in the process: leave that "
                "to whoever runs it"
            )
