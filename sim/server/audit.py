"""The audit of a run: what its canaries prove of epsilon, beside what was promised.

See `fedkd.data.canaries` for which rows they are, `fedkd.privacy.attacks.audit` for the bound.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedkd.data import FederatedData
from fedkd.exchange.release import NoRelease
from fedkd.models import build_model
from fedkd.privacy.attacks.audit import best_guesses, most_provable
from fedkd.privacy.attacks.membership import loss_scores
from fedkd.tensors import as_tensor
from fedkd.training import Architecture, ClientState
from fedkd.training.cohort import named_models
from fedkd.training.pool import PREDICT_ROWS
from sim.server.observers import Row
from sim.settings import Settings

CONFIDENCE = 0.95


def check_audit(settings: Settings, *, nodes: bool) -> None:
    """Refuse an audit of what is not there to be audited.

    Args:
        settings: of the run.
        nodes: whether clients are nodes of Flower's own runtimes.

    Raises:
        ValueError: naming the setting, the reason and what would work.
    """
    audit, rule = settings.privacy.audit, settings.privacy.mechanism
    if not audit.canaries:
        return
    if nodes:
        raise ValueError(
            "privacy.audit looks at a client's model, and nodes of Flower's own runtimes keep "
            "theirs to themselves; use fedkd run"
        )
    if not (rule.learns or isinstance(rule, NoRelease)):
        raise ValueError(
            f"privacy.audit looks at a client's model, which privacy.mechanism {rule.kind} does "
            "not protect (it protects what is sent), so nothing that was promised could be "
            "contradicted; use privacy.mechanism: dp_sgd, or none"
        )
    if audit.client in settings.stages.controlled:
        raise ValueError(
            f"privacy.audit.client {audit.client} is controlled by adversary "
            f"{settings.adversary.kind}, and lies; choose an honest client"
        )


def audit_told(settings: Settings) -> str:
    """Say before a run what its audit can prove; empty where there is none."""
    audit, delta = settings.privacy.audit, settings.privacy.delta
    if not audit.canaries:
        return ""
    most = most_provable(audit.canaries, delta=delta, confidence=CONFIDENCE)
    return (
        f"audit of client {audit.client}: {audit.canaries:,} of its rows are canaries, with wrong "
        f"labels and in or out by lot. If all are told apart they prove epsilon > {most:.4g} "
        f"(delta {delta:g}, {CONFIDENCE:.0%}); a claim above that cannot be contradicted"
    )


def audited(
    settings: Settings,
    data: FederatedData,
    architecture: Architecture,
    state: ClientState | None,
    spent: Row,
) -> Row:
    """Return what the canaries of a finished run prove; empty where there are none.

    The client's first model, as it was left by its last training, is asked for the loss on each
    canary with its wrong label: the lower, the likelier it was learnt.

    Args:
        settings: of the run.
        data: of the run.
        architecture: what the client trains.
        state: of the client after the run; None: it never trained.
        spent: what the run has spent of privacy; empty where nothing is promised.

    Returns:
        ``client``, ``canaries``, ``guesses`` and how many were ``right``, ``epsilon_lower`` with
        ``confidence`` at ``delta``, ``claimed`` for the client (none: nothing), ``contradicted``.
    """
    canaries = data.canaries
    if canaries is None:
        return {}
    delta = settings.privacy.delta
    scores = np.zeros(len(canaries.rows))  # of a client that never trained nothing can be told
    if state is not None:
        own = data.of_client(canaries.client)
        logits = _logits(architecture, state, own, canaries.rows)
        scores = loss_scores(logits, own.train_labels[canaries.rows])
    found = best_guesses(scores, canaries.inside, delta=delta, confidence=CONFIDENCE)
    clients: Mapping[str, Any] = spent.get("clients", {})
    claimed = clients.get(str(canaries.client), spent.get("epsilon"))
    return {
        "client": canaries.client,
        "canaries": len(canaries.rows),
        "guesses": found.guesses,
        "right": found.right,
        "epsilon_lower": found.epsilon,
        "confidence": CONFIDENCE,
        "delta": delta,
        "claimed": claimed,
        "contradicted": claimed is not None and found.epsilon > claimed,
    }


def _logits(
    architecture: Architecture,
    state: ClientState,
    data: FederatedData,
    rows: NDArray[np.int64],
) -> NDArray[np.float64]:
    name, settings = next(iter(named_models(architecture).items()))
    module = build_model(
        settings, input_shape=data.input_shape, num_classes=data.num_classes, seed=0
    ).eval()
    weights = state.models[name].weights
    module.load_state_dict({key: as_tensor(array) for key, array in weights.items()})
    inputs = as_tensor(data.train_inputs[rows])
    with torch.inference_mode():
        logits = [module(some).double().numpy() for some in inputs.split(PREDICT_ROWS)]
    return np.concatenate(logits)
