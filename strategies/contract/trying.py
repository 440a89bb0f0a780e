"""Every model that an algorithm trains, tried before any worker starts."""

from typing import Any

import torch

from fedkd.data import FederatedData
from fedkd.models import build_model, uses_batch_norm
from fedkd.models.memory import check_memory
from fedkd.randomness import torch_generator
from fedkd.training import OptimizerSettings, as_tensor
from fedkd.training.trial import SingleRowError, TrialSettings, try_model
from strategies.contract.strategy import Step, Strategy

TRIAL_ROWS = 16
"""Real rows that models are tried on, at most."""


def check_models(
    strategy: Strategy[Any, Any],
    data: FederatedData,
    *,
    optimizer: OptimizerSettings,
    stacked: bool = False,
    keeps_states: bool = False,
) -> None:
    """Refuse models that do not fit the data, the machine, or the steps that they are to take.

    Args:
        strategy: says which models there are.
        data: of the run.
        optimizer: of every model.
        stacked: whether clients have to train stacked.
        keeps_states: whether this machine keeps the states of all clients.

    Raises:
        ValueError: naming the setting, the model and what would work.
    """
    for step in _smallest(strategy):
        try:
            _check(step, strategy, data, optimizer, stacked, keeps_states)
        except SingleRowError as error:
            raise ValueError(f"{step.setting}: {error}, but {step.remedy}") from error
        except ValueError as error:
            raise ValueError(f"{step.setting}: {error}") from error


def _smallest(strategy: Strategy[Any, Any]) -> list[Step]:
    """Return one step for each setting and model: the smallest, or one that trains nothing."""
    found: dict[tuple[object, ...], Step] = {}
    for step in strategy.smallest_steps():
        key = step.setting, step.model.key, step.input_shape, step.view
        known = found.get(key)
        if known is None or known.rows is None or (step.rows or known.rows) < known.rows:
            found[key] = step
    return list(found.values())


def _check(
    step: Step,
    strategy: Strategy[Any, Any],
    data: FederatedData,
    optimizer: OptimizerSettings,
    stacked: bool,
    keeps_states: bool,
) -> None:
    model, classes = step.model, data.num_classes
    data = data.views[step.view - 1] if step.view else data
    input_shape = step.input_shape or data.input_shape
    holders = strategy.federation.models.count(model) if keeps_states else 0
    check_memory(
        model,
        input_shape=input_shape,
        num_classes=classes,
        slots=optimizer.slots,
        states=holders,
    )
    trains = step.rows is not None
    fewest = step.rows or 2
    if model.is_own:
        some, labels = data.train_inputs[:TRIAL_ROWS], data.train_labels[:TRIAL_ROWS]
        inputs, vocabulary = as_tensor(some), data.vocabulary
        if step.input_shape is not None:
            # What such rows hold is known once somebody has trained.
            drawn, vocabulary = torch_generator(0), None
            inputs = torch.randn(len(some), *input_shape, generator=drawn)
        rows = inputs, as_tensor(labels)
        use = TrialSettings(optimizer, fewest, trains=trains, stacked=stacked)
        try_model(model, rows, num_classes=classes, use=use, vocabulary=vocabulary)
        return
    module = build_model(model, input_shape=input_shape, num_classes=classes, seed=0)
    if trains and fewest < 2 and uses_batch_norm(module):
        raise SingleRowError(f"{model.label} has BatchNorm, which cannot train on a single row")
