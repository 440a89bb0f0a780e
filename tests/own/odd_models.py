"""Models as people bring them: each has one habit, named by its class or its ``kind``."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm


class Plain(nn.Module):
    """Two layers; subclasses add a habit."""

    def __init__(self, shape, classes):
        super().__init__()
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 8), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.first(x))


class Unbiased(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.head = nn.Linear(8, classes, bias=False)


class InPlace(Plain):
    def forward(self, x):
        x -= 0.5
        x.clamp_(min=0)
        return super().forward(x)


class OutOfPlace(Plain):
    def forward(self, x):
        return super().forward((x - 0.5).clamp(min=0))


class ReluFirst(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.start = nn.ReLU(inplace=True)

    def forward(self, x):
        return super().forward(self.start(x))


class PythonDepth(Plain):
    """Stochastic depth with Python's generator, and NumPy's."""

    def forward(self, x):
        features = self.first(x)
        if self.training and random.random() < 0.5:
            features = features * float(np.random.rand())
        return self.head(features)


class EvalNoise(Plain):
    """Draws when it is judged, too."""

    def forward(self, x):
        return self.head(F.dropout(self.first(x), 0.5, training=True))


class Centred(Plain):
    """Takes the mean of a batch off, by hand."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class Cached(Plain):
    """Remembers what changes nothing: its last features, and a table by size."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.tables, self.last, self.calls = {}, None, []

    def forward(self, x):
        if len(x) not in self.tables:
            self.tables[len(x)] = torch.ones(len(x), 1)
        self.last = self.first(x)
        self.calls.append(len(x))
        return self.head(self.last * self.tables[len(x)])


class Late(Plain):
    """Keeps a count outside its state that makes a difference only after many steps."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.counts = {"steps": 0}

    def forward(self, x):
        self.counts["steps"] += self.training
        return super().forward(x) * (1 if self.counts["steps"] < 6 else 3)


class Masked(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))
        self.register_buffer("unset", torch.tensor(float("nan")))

    def forward(self, x):
        return super().forward(x) + self.mask.tril().nan_to_num(0, 0, 0).sum()


class Scaled(Plain):
    """A parameter and counters without dimensions."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("is_used", torch.tensor(False))

    def forward(self, x):
        if self.training:
            self.seen = self.seen + len(x)
            self.is_used.fill_(True)
        return self.scale * super().forward(x)


class Tempered(Plain):
    """A parameter without dimensions, and nothing that a forward pass changes."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * super().forward(x)


class Running(Plain):
    """Keeps running statistics of each row by itself."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)

    def forward(self, x):
        return self.head(self.norm(self.first(x)[:, None])[:, 0])


class Bounded(Plain):
    """Shortens, in its forward pass, the vectors that it looks up."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.signs = nn.Embedding(2, classes, max_norm=1.0)

    def forward(self, x):
        return super().forward(x) + self.signs((x.flatten(1)[:, 0] > 0).long())


class Remembering(Plain):
    """Remembers the last rows' features in a buffer."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("seen", torch.zeros(8))

    def forward(self, x):
        features = self.first(x)
        if self.training:
            self.seen = features.detach().mean(0)
        return self.head(features)


class Counting(Plain):
    """Counts its later steps of more than a row in a buffer."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls > 2 and len(x) > 1:
            self.seen.add_(1)
        return super().forward(x)


class Tied(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.again = self.inner
        self.first = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), 8))
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.again(self.inner(self.first(x)).relu()))


class SharedWeight(Tied):
    """Two layers with one weight, which has a name in each."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.inner.weight


class Lazy(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, classes))

    def forward(self, x):
        return self.net(x)


class Normed(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        weight_norm(self.head)
        spectral_norm(self.first[1])


class PartlyFrozen(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.first.requires_grad_(False)


class Strided(Plain):
    """Parameters and outputs that do not lie in a row."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.turned = nn.Parameter(torch.randn(8, classes).t())

    def forward(self, x):
        return (self.turned @ self.first(x).t()).t()


class Half(Plain):
    """Computes in double precision between float32 weights and logits of float64."""

    def forward(self, x):
        return super().forward(x).double()


class Batched(Plain):
    """A BatchNorm of its own, which no type tells."""

    def forward(self, x):
        features = self.first(x)
        if self.training and len(x) < 2:
            raise ValueError("more than one row, please")
        if self.training:
            features = features - features.mean(0)
        return self.head(features)


# -- what cannot be used -----------------------------------------------------------------------


class HiddenMean(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("mean", torch.zeros(8), persistent=False)

    def forward(self, x):
        features = self.first(x)
        if self.training:
            self.mean.mul_(0.9).add_(features.detach().mean(0), alpha=0.1)
        return self.head(features - self.mean)


class HiddenList(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.means = []

    def forward(self, x):
        features = self.first(x)
        if self.training:
            self.means.append(features.detach().mean())
        return self.head(features) + len(self.means)


class WarmUp(Plain):
    """Its count is read in training only."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.step = 0

    def forward(self, x):
        self.step += self.training
        return super().forward(x) * (min(1.0, self.step / 10) if self.training else 1.0)


class LateBuffer(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("mean", None)

    def forward(self, x):
        features = self.first(x)
        if self.training:
            self.mean = features.detach().mean(0)
        return self.head(features)


class BatchBuffer(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("last", torch.zeros(0, 8))

    def forward(self, x):
        self.last = self.first(x).detach()
        return super().forward(x)


class Unfreezing(Plain):
    """Opens a layer after its first step."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.first.requires_grad_(False)

    def forward(self, x):
        logits = super().forward(x)
        if self.training:
            self.first.requires_grad_(True)
        return logits


class SharedCount(Plain):
    steps = 0

    def forward(self, x):
        SharedCount.steps += self.training
        return super().forward(x) * (1 + SharedCount.steps)


class OwnEntropy(Plain):
    def forward(self, x):
        noise = np.random.default_rng().standard_normal()
        return super().forward(x) + (noise if self.training else 0.0) * self.head.bias


class OwnGenerator(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        features = self.first(x)
        if self.training:
            features = features * torch.rand(features.shape, generator=self.generator)
        return self.head(features)


class RandomFeatures(Plain):
    """What it draws when it is built is in no state."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.frequencies = torch.randn(8)

    def forward(self, x):
        return self.head(torch.cos(self.first(x) * self.frequencies))


class UnseededFirst(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        with torch.no_grad():
            self.head.bias.fill_(float(np.random.default_rng().standard_normal()))


class Auxiliary(Plain):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, self.first(x)) if self.training else logits


class Table(Plain):
    def forward(self, x):
        logits = super().forward(x)
        return {"logits": logits} if self.training else logits


class Softmax(Plain):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Extra(Plain):
    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


class PartialState(Plain):
    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if "head" in name}


class BFloat(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.bfloat16()

    def forward(self, x):
        return super().forward(x.bfloat16())


class BFloatLogits(Plain):
    def forward(self, x):
        return super().forward(x).bfloat16()


class Frozen(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.requires_grad_(False)


class Empty(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return x.flatten(1)[:, : self.classes]


class Detached(Plain):
    def forward(self, x):
        return super().forward(x).detach().requires_grad_()


class NanFirst(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        nn.init.constant_(self.head.weight, float("nan"))


class NanOut(Plain):
    def forward(self, x):
        return super().forward(x) / 0.0


class NewParameter(Plain):
    def forward(self, x):
        logits = super().forward(x)
        if self.training:
            self.head.weight = nn.Parameter(self.head.weight.detach() * 0.9)
        return logits


class FixedBatch(Plain):
    def forward(self, x):
        return super().forward(x.reshape(2, -1, *x.shape[1:]).flatten(0, 1))


class DefaultType(Plain):
    def forward(self, x):
        torch.set_default_dtype(torch.float64)
        return super().forward(x)


class Threads(Plain):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        torch.set_num_threads(3)


class WholeBatch(Plain):
    """Looks at the batch as a whole, where a stack's padding takes part."""

    def forward(self, x):
        features = self.first(x)
        return self.head(features - features.mean(0))


class Branching(Plain):
    def forward(self, x):
        features = self.first(x)
        return self.head(features if features.sum() > 0 else -features)


def make(input_shape, num_classes, kind):
    """Return the model of a kind; the one factory of all of them."""
    return globals()[kind](input_shape, num_classes)


def fixed(input_shape, num_classes):
    """Seed everything, as many a script does first."""
    random.seed(42)
    np.random.seed(42)
    torch.manual_seed(42)
    return Plain(input_shape, num_classes)


def zeros(input_shape, num_classes):
    """Begin with zeros, whatever the seed."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(input_shape)), num_classes))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    return model
