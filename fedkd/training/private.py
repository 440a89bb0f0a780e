"""Private learning: DP-SGD on each member's own rows, and what a cohort refuses beside it.

Under `PrivateLearning` an algorithm asks for the same fits as ever. Steps on private rows draw each
row by itself, clip its gradient, and add Gaussian noise. Everything made of the weights afterwards
costs no more privacy; every other way from private rows to a number that an algorithm sees is
refused. Who pays for the steps, and how much, is not settled here.

Noise and draws are pseudo-random, from the run's seed: a simulation of the mechanism. Whoever
knows the seed can take the noise off, and attacks on floating-point noise are out of scope
(Mironov, 2012, https://doi.org/10.1145/2382196.2382264).

Source:
    Abadi et al., 2016, Deep Learning with Differential Privacy, Algorithm 1.
    https://arxiv.org/abs/1607.00133
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedkd.randomness import Purpose, seeded_for, torch_seed_for
from fedkd.training.batches import Passes, PoissonPasses
from fedkd.training.cohort import Member, Streams
from fedkd.training.feeds import FitKey
from fedkd.training.gradients import GradientRule, Method, Noised, Proximal, RowNorms
from fedkd.training.tables import Table


class PrivacyError(ValueError):
    """What would tell of private rows past the noise; the text says what would be sound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateLearning:
    """DP-SGD of the members of one call.

    Two data sets of a member are neighbours where one has a row more; the number of rows, from
    which the probability of a draw follows, is taken to be known.

    Attributes:
        clip: largest Euclidean norm of a row's gradient, > 0.
        batch_size: rows of a step on average, >= 1: each of a member's rows is drawn with
            probability ``min(1, batch_size / rows)``.
        noise_multipliers: by member, in the order in which the cohort gets them: standard
            deviation of the noise on the sum of gradients over ``clip``, >= 0; 0 clips without
            noise, which is no privacy and for tests.
        most_steps: by member, how many steps on private rows the call may take, >= 0.
        attempt: number of the call's attempt, >= 1; each draws rows and noise of its own.

    Raises:
        ValueError: for numbers out of range.
    """

    clip: int | float
    batch_size: int
    noise_multipliers: tuple[int | float, ...]
    most_steps: tuple[int, ...]
    attempt: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be > 0 and finite, got {self.clip}")
        for name in ("batch_size", "attempt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for multiplier in self.noise_multipliers:
            if not 0 <= multiplier < math.inf:
                raise ValueError(f"noise_multipliers must be >= 0 and finite, got {multiplier}")
        if min(self.most_steps, default=0) < 0:
            raise ValueError(f"most_steps must be >= 0, got {min(self.most_steps)}")


class PrivateCall:
    """Private learning in one call of a cohort, and the steps taken so far.

    Args:
        learning: how.
        members: the cohort's, in the order in which it got them.
        streams: where random numbers come from.

    Raises:
        ValueError: for numbers of other members.
    """

    def __init__(
        self, learning: PrivateLearning, members: Sequence[Member], streams: Streams
    ) -> None:
        for name in ("noise_multipliers", "most_steps"):
            count = len(getattr(learning, name))
            if count != len(members):
                raise ValueError(
                    f"{name} must have a number for each of {len(members)} members, got {count}"
                )
        self.attempt = learning.attempt
        self._learning, self._members, self._streams = learning, members, streams
        self._taken = [0] * len(members)

    def passes(self, asked: Passes | Sequence[Passes]) -> list[PoissonPasses]:
        """Return how each member draws its rows, and count the steps as taken.

        Raises:
            PrivacyError: for batches of another size, and more steps than were paid for.
        """
        each = [asked] * len(self._members) if isinstance(asked, Passes) else list(asked)
        taken = list(self._taken)
        for position, (own, member) in enumerate(zip(each, self._members, strict=True)):
            steps = own.count(len(member.rows))
            if steps and own.batch_size != self._learning.batch_size:
                raise PrivacyError(
                    f"private learning was paid for with batches of {self._learning.batch_size} "
                    f"rows, and a fit asks for {own.batch_size}: use passes of batch_size="
                    f"{self._learning.batch_size}"
                )
            taken[position] += steps
            most = self._learning.most_steps[position]
            if taken[position] > most:
                raise PrivacyError(
                    f"client {member.client} would take {taken[position]} steps on private rows in "
                    f"this call, and {most} were paid for: fit in fewer steps, or plan for more"
                )
        self._taken = taken
        return [PoissonPasses.of(own) for own in each]

    def rule(self, asked: GradientRule, key: FitKey, method: Method) -> Noised:
        """Return the rule of a fit on private rows; a proximal pull stays.

        Args:
            asked: the algorithm's; it has no other say.
            key: of the fit.
            method: how rows are clipped.
        """
        learning, streams = self._learning, self._streams
        return Noised(
            norm=learning.clip,
            expected_batch=tuple(
                min(len(member.rows), learning.batch_size) for member in self._members
            ),
            method=method,
            noise_multipliers=learning.noise_multipliers,
            seeds=tuple(
                torch_seed_for(
                    streams.seed,
                    Purpose.PRIVATE_NOISE,
                    streams.round,
                    member.client,
                    learning.attempt,
                    key.number,
                    key.purpose,
                )
                for member in self._members
            ),
            mu=asked.mu if isinstance(asked, Proximal) else 0.0,
        )


def check_fit(
    learning: Sequence[str],
    tables: Mapping[str, Table],
    *,
    has_parts: bool,
    keep_outputs: bool,
) -> None:
    """Refuse a fit on private rows that tells of them in another way than by noised gradients.

    Args:
        learning: models that learn in it.
        tables: what its objective sees.
        has_parts: whether something is trained beside the models.
        keep_outputs: whether outputs for private rows are kept.

    Raises:
        PrivacyError: naming what is asked for and what would be sound.
    """
    if len(learning) > 1:
        raise PrivacyError(
            f"models {', '.join(map(repr, learning))} learn from each other on private rows, and "
            "what a peer has learnt from a row is not bounded by clipping: let one model learn "
            "from private rows in a fit, and peers from each other on public rows"
        )
    if has_parts:
        raise PrivacyError(
            "parts that are trained beside a model on private rows get no noise: use terms "
            "without parts, or train them on public rows"
        )
    if keep_outputs:
        raise PrivacyError(
            "keep_outputs returns outputs for private rows, which have no noise: ask for outputs "
            "on public rows after the fit"
        )
    odd = [name for name, table in tables.items() if table.of == "private"]
    if odd:
        raise PrivacyError(
            f"table {odd[0]!r} has a number for each private row, made of what rows say past the "
            "noise: use a table of public rows, or a whole one made of what was sent"
        )


def check_rows_chosen(on: object) -> None:
    """Refuse to show private rows, or what a model puts out for them.

    Raises:
        PrivacyError: saying what would be sound.
    """
    if isinstance(on, str) and on == "private":
        raise PrivacyError(
            "under private learning nothing but fits may see private rows, got on='private': use "
            "positions in the public set"
        )


def check_module(name: str, module: nn.Module, inputs: Tensor) -> None:
    """Refuse a model that carries numbers of private rows past the noise.

    Args:
        name: of the model.
        module: it may be changed.
        inputs: a few rows to try, which are nobody's.

    Raises:
        PrivacyError: naming the layer and what would be sound.
    """
    for path, layer in module.named_modules():
        kind = type(layer).__name__.removeprefix("Masked")
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise PrivacyError(
                f"layer {path!r} of model {name!r} is a {kind}, which mixes the rows of a step: "
                "use norm: group, or a model without it"
            )
        if getattr(layer, "track_running_stats", False):
            raise PrivacyError(
                f"layer {path!r} of model {name!r} is a {kind} that keeps running statistics of "
                "private rows: use norm: group, or a model without it"
            )
        if getattr(layer, "max_norm", None) is not None:
            raise PrivacyError(
                f"layer {path!r} of model {name!r} is a {kind} with max_norm, which changes the "
                "weights of the tokens that a step reads: leave max_norm out"
            )
    before = StillBuffers(dict(module.named_buffers()))
    with torch.no_grad():
        module.train()(inputs)
    before.check(name, dict(module.named_buffers()))
    if _mixes_rows(module, inputs):
        raise PrivacyError(
            f"model {name!r} puts out other numbers for a row beside other rows: what it says of "
            "public rows would tell of the private ones of a step; use a model that looks at each "
            "row by itself"
        )


def _mixes_rows(module: nn.Module, inputs: Tensor) -> bool:
    """Tell whether what a model says of the first row depends on the others."""
    others = torch.ones_like(inputs)
    others[:1] = inputs[:1]
    said = []
    for rows in (inputs, others):
        # The same dropout both times.
        with torch.no_grad(), seeded_for(own_code=True, seed=0):
            said.append(module.train()(rows.clone())[:1])
    alone, beside = said
    return not torch.allclose(alone, beside, rtol=1e-3, atol=1e-5, equal_nan=True)


def method_of(module: nn.Module, inputs: Tensor, *, own_code: bool) -> Method:
    """Return how the gradients of a model's rows are clipped: by norms if they can be measured.

    Args:
        module: the model.
        inputs: a few rows to try.
        own_code: whether it is somebody else's, which may use its weights in ways that nothing
            can measure.
    """
    if own_code:
        return "vmap"
    try:
        norms = RowNorms({"model": module})
        with norms.watching():
            norms.shapes("model", lambda: module(inputs))
    except ValueError:
        return "vmap"
    return "norms"


class StillBuffers:
    """Buffers of a model, which private learning must leave as they are.

    Args:
        buffers: by name.
    """

    def __init__(self, buffers: Mapping[str, Tensor]) -> None:
        self._before = {name: each.clone() for name, each in buffers.items()}

    def check(self, model: str, now: Mapping[str, Tensor]) -> None:
        """Refuse a model whose buffers have changed.

        Args:
            model: its name.
            now: its buffers.

        Raises:
            PrivacyError: naming the buffer.
        """
        for name, before in self._before.items():
            if not _same(before, now[name]):
                raise PrivacyError(
                    f"buffer {name!r} of model {model!r} changed while it learnt from private "
                    "rows, and has no noise: use a model that keeps nothing but weights"
                )


def _same(one: Tensor, other: Tensor) -> bool:
    """Tell whether numbers are the same, where one that is none equals itself."""
    return bool(((one == other) | ((one != one) & (other != other))).all())
