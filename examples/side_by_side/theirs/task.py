"""Data, model, training and testing."""

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F


def load(settings: dict) -> dict:
    """Read the table and split it: test, public, and each client's rows."""
    rng = np.random.default_rng(settings["seed"])
    table = pd.read_csv(settings["data"])
    labels = table.pop(settings["label"]).astype("category").cat.codes.to_numpy()
    order = rng.permutation(len(table))
    test, rest = order[: len(order) // 5], order[len(order) // 5 :]
    public, private = rest[: settings["public_rows"]], rest[settings["public_rows"] :]
    x = table.to_numpy(np.float32)
    x = (x - x[private].mean(0)) / (x[private].std(0) + 1e-8)
    parts = [[] for _ in range(settings["clients"])]
    for label in np.unique(labels):
        rows = private[labels[private] == label]
        shares = rng.dirichlet(np.full(len(parts), settings["alpha"]))
        ends = (np.cumsum(shares) * len(rows)).astype(int)[:-1]
        for part, piece in zip(parts, np.split(rows, ends), strict=True):
            part.extend(piece)
    for part in parts:  # a client without rows cannot train
        if not part:
            part.append(max(parts, key=len).pop())
    return {"x": x, "y": labels, "test": test, "public": public, "parts": parts}


def make_model(features: int, classes: int, seed: int) -> nn.Module:
    """Return a seeded network."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, classes))


def fit(model, x, y, settings, *, distil: bool) -> None:
    """Learn labels, or logits."""
    optimizer = torch.optim.Adam(model.parameters(), settings["lr"])
    for _ in range(settings["epochs"]):
        for batch in torch.randperm(len(x)).split(settings["batch_size"]):
            out = model(x[batch])
            loss = F.l1_loss(out, y[batch]) if distil else F.cross_entropy(out, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
