"""Gradient rules: what becomes of the losses of a step before an optimizer sees a gradient.

A rule belongs to a fit (`Cohort.fit`). It works the same for one client and for stacked ones, whose
tensors have the members as first dimension.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.losses.reduction import Loss, StepRows, WholeStep
from fedkd.randomness import torch_generator
from fedkd.training.steps import total


@dataclass(frozen=True, slots=True)
class GradientRule:
    """How the gradient of a step is made of its losses."""


@dataclass(frozen=True, slots=True)
class Plain(GradientRule):
    """The gradient of the sum of the losses, each a mean over its rows."""


PLAIN = Plain()
"""Gradients as they are: what every step takes that says nothing else."""

Method = Literal["norms", "vmap"]
"""How the gradients of rows are clipped, see `Clipped`."""

Rules = GradientRule | Mapping[str, GradientRule]
"""One rule for all models that learn in a fit, or one for some by name; the others have `Plain`."""


def rules_of(given: Rules, learning: Sequence[str]) -> dict[str, GradientRule]:
    """Return the rule of each model that learns.

    Raises:
        ValueError: naming a rule of a model that does not learn.
    """
    if isinstance(given, GradientRule):
        return dict.fromkeys(learning, given)
    odd = sorted(given.keys() - set(learning))
    if odd:
        raise ValueError(
            f"gradient rule of {odd[0]!r}, which does not learn in this fit; these do: "
            f"{', '.join(learning)}"
        )
    return {name: given.get(name, PLAIN) for name in learning}


@dataclass(frozen=True, slots=True)
class Proximal(GradientRule):
    """Plain, and ``mu / 2 * ||w - w0||^2`` towards the weights from which the fit began.

    It holds the models that learn, and nothing that is trained beside them. The penalty is among
    the metrics as ``loss/proximal``.

    Attributes:
        mu: >= 0; 0 is `Plain`.

    Raises:
        ValueError: if ``mu`` is negative or not finite.

    Source:
        Li et al., 2020, Federated Optimization in Heterogeneous Networks (FedProx), equation 2.
        https://arxiv.org/abs/1812.06127
    """

    mu: float

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"mu must be >= 0 and finite, got {self.mu}")


class Anchor:
    """The weights from which a fit began, and the pull towards them.

    Args:
        mus: how strong it is for each of the weights; 0: not at all.
        start: the weights, of one client or ``[members, ...]`` each.
    """

    def __init__(self, mus: Sequence[float], start: Sequence[Tensor]) -> None:
        self._mus, self._start = mus, start

    @classmethod
    def of(
        cls, rules: Mapping[str, GradientRule], weights: Mapping[str, Sequence[Tensor]]
    ) -> "Anchor | None":
        """Return an anchor where a rule has one.

        Args:
            rules: of each model.
            weights: of each model, which `penalty` and `pulled` get in this order.
        """
        mus = [
            rule.mu if isinstance(rule, Proximal | Noised) else 0.0
            for name, rule in rules.items()
            for _ in weights[name]
        ]
        if not any(mus):
            return None
        return cls(mus, [each.detach().clone() for name in rules for each in weights[name]])

    def of_members(self, here: slice) -> "Anchor":
        """Return the anchor of some of the members."""
        return Anchor(self._mus, [each[here] for each in self._start])

    def penalty(self, weights: Sequence[Tensor], *, stacked: bool) -> Float[Tensor, "*members"]:
        """Return ``mu / 2 * ||w - w0||^2``, for each member where they are stacked."""
        squares: dict[float, list[Tensor]] = {}
        for mu, now, start in zip(self._mus, weights, self._start, strict=True):
            if mu:
                square = (now.detach() - start).square()
                squares.setdefault(mu, []).append(
                    square.reshape(len(square), -1).sum(1) if stacked else square.sum()
                )
        first, *others = (mu / 2 * torch.stack(each).sum(0) for mu, each in squares.items())
        for other in others:
            first = first + other
        return first

    def pulled(
        self, gradients: Sequence[Tensor | None], weights: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Return gradients with ``mu * (w - w0)`` added; what has none did not move."""
        return [
            gradient + mu * (now.detach() - start) if gradient is not None and mu else gradient
            for mu, gradient, now, start in zip(
                self._mus, gradients, weights, self._start, strict=True
            )
        ]


@dataclass(frozen=True, slots=True)
class Clipped(GradientRule):
    """The gradient of each private row is clipped; their sum is divided by the expected batch.

    No noise is added. With ``c = min(1, norm / ||g||)`` for the gradient g of a private row's
    losses with respect to one model, that model gets ``sum c * g / expected_batch``: divided by a
    constant and not by the rows drawn, so that one row more or less moves it by
    ``norm / expected_batch`` at most. A row's weight multiplies its loss, and no sum of weights
    divides. Losses of public rows are no secret and join in as plain means.

    A row whose gradient is not finite counts for nothing, as if it had not been drawn.

    Attributes:
        norm: the largest Euclidean norm of a row's gradient, > 0.
        expected_batch: private rows of a step on average, > 0: the same for all members of a
            cohort, or one for each.
        method: ``norms`` finds the norms from what layers read and what comes back to them, and
            takes one weighted backward pass; ``vmap`` makes every row's gradient, for any model
            whose rows do not mix, at many times the cost.

    Raises:
        ValueError: for numbers out of range.

    Source:
        Abadi et al., 2016, Deep Learning with Differential Privacy, Algorithm 1, without its noise.
        https://arxiv.org/abs/1607.00133. Norms without gradients: Goodfellow, 2015,
        https://arxiv.org/abs/1510.01799; Li et al., 2022, https://arxiv.org/abs/2110.05679
    """

    norm: int | float
    expected_batch: int | float | tuple[int | float, ...]
    method: Method = "norms"

    def __post_init__(self) -> None:
        for name in ("norm", "expected_batch"):
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if not 0 < value < math.inf:
                    raise ValueError(f"{name} must be > 0 and finite, got {value}")

    def check(self, members: int) -> None:
        """Refuse numbers for another number of members.

        Raises:
            ValueError: saying how many there are.
        """
        if isinstance(self.expected_batch, tuple) and len(self.expected_batch) != members:
            raise ValueError(
                f"expected_batch must be one for all or one for each of {members} members, got "
                f"{len(self.expected_batch)}"
            )

    def for_members(self, positions: Sequence[int]) -> "Clipped":
        """Return the rule with the numbers of some of a cohort's members, in this order."""
        if not isinstance(self.expected_batch, tuple):
            return self
        return replace(self, expected_batch=_picked(self.expected_batch, positions))

    def shares(self, norms: Float[Tensor, "*members rows"]) -> Float[Tensor, "*members rows"]:
        """Return what each row's gradient is multiplied by."""
        smallest = torch.finfo(norms.dtype).tiny
        shares = (self.norm / norms.clamp_min(smallest)).clamp_max(1.0)
        if not isinstance(self.expected_batch, tuple):
            return shares / self.expected_batch
        expected = norms.new_tensor(self.expected_batch)
        return shares / (expected[:, None] if norms.ndim > 1 else expected)


@dataclass(frozen=True, slots=True)
class Noised(Clipped):
    """Clipped, with Gaussian noise on every weight that learns; each number is of one member.

    The noise has the standard deviation ``noise_multiplier * norm / expected_batch``, whatever was
    drawn, and is also on weights that no private row reaches. Made by
    `fedkd.training.private.PrivateLearning`.

    Attributes:
        noise_multipliers: standard deviations of the noise over ``norm``, >= 0.
        seeds: of each member's noise in this fit.
        mu: a pull towards the weights from which the fit began, as in `Proximal`. It depends on
            weights alone, so it costs no privacy.

    Source:
        Abadi et al., 2016, Algorithm 1. https://arxiv.org/abs/1607.00133
    """

    expected_batch: tuple[int | float, ...]
    noise_multipliers: tuple[int | float, ...] = ()
    seeds: tuple[int, ...] = ()
    mu: float = 0.0

    def for_members(self, positions: Sequence[int]) -> "Noised":
        """Return the rule with the numbers of some of a cohort's members, in this order."""
        return replace(
            self,
            expected_batch=_picked(self.expected_batch, positions),
            noise_multipliers=_picked(self.noise_multipliers, positions),
            seeds=_picked(self.seeds, positions),
        )

    @property
    def deviations(self) -> tuple[float, ...]:
        """Standard deviations of the noise on a weight's gradient."""
        return tuple(
            multiplier * self.norm / expected
            for multiplier, expected in zip(
                self.noise_multipliers, self.expected_batch, strict=True
            )
        )


Number = TypeVar("Number", bound=int | float)


def _picked(numbers: tuple[Number, ...], positions: Sequence[int]) -> tuple[Number, ...]:
    return tuple(numbers[position] for position in positions)


class Noise:
    """The noise of a fit's members, step by step: each draws from a stream of its own.

    A member's noise of a step is one vector over all its weights, drawn on the CPU, so it is the
    same alone and stacked with others, on whatever device. It is pseudo-random: a simulation's,
    not a cryptographer's.

    Args:
        rule: of the members, in their order.
        shapes: of the weights that learn, as the model of one client has them.
        turned: which of the weights lie transposed.
        like: a weight, for what noise is drawn as and where it goes.
    """

    def __init__(
        self,
        rule: Noised,
        shapes: Sequence[torch.Size],
        like: Tensor,
        turned: Sequence[bool] | None = None,
    ) -> None:
        self._deviations = rule.deviations
        self._generators = [torch_generator(seed) for seed in rule.seeds]
        self._shapes = shapes
        self._turned = [False] * len(shapes) if turned is None else turned
        self._device = like.device
        width = sum(shape.numel() for shape in shapes)
        self._drawn = torch.zeros(len(self._generators), width, dtype=like.dtype)

    def of_step(self, here: slice) -> list[Tensor]:
        """Draw what members that take a step together get: ``[members, ...]`` for each weight."""
        for member in range(*here.indices(len(self._generators))):
            if self._deviations[member]:
                self._drawn[member].normal_(
                    0.0, self._deviations[member], generator=self._generators[member]
                )
        drawn = self._drawn[here].to(self._device)
        parts = drawn.split([shape.numel() for shape in self._shapes], dim=1)
        shaped = [
            part.reshape(len(part), *shape) for part, shape in zip(parts, self._shapes, strict=True)
        ]
        return [
            each.mT if turned else each for each, turned in zip(shaped, self._turned, strict=True)
        ]

    def onto(self, gradients: Sequence[Tensor | None], here: slice | None = None) -> list[Tensor]:
        """Return gradients with the noise of the next step; what has no gradient gets noise alone.

        Args:
            gradients: of every weight.
            here: which members take the step, whose gradients are ``[members, ...]``; None: the
                one that there is.
        """
        noise = self.of_step(slice(0, 1) if here is None else here)
        noise = [each[0] for each in noise] if here is None else noise
        # A gradient of its own for each weight: what is drawn is overwritten in the next step.
        return [
            own.clone() if gradient is None else gradient + own
            for gradient, own in zip(gradients, noise, strict=True)
        ]


class SplitLosses(NamedTuple):
    """A step's losses for a rule that clips the gradients of rows.

    Attributes:
        private: each private row's loss; 0 where it does not count.
        public: the mean over the public rows; None without any.
        means: every loss as the metrics show it.
    """

    private: Float[Tensor, " rows"]
    public: Float[Tensor, ""] | None
    means: dict[str, Float[Tensor, ""]]

    @classmethod
    def of(cls, losses: Mapping[str, Loss], rows: StepRows) -> "SplitLosses":
        """Tell private rows from public ones.

        Raises:
            ValueError: naming a loss that compares rows, or what is missing.
        """
        if "private" not in rows.sizes:
            raise ValueError(
                "gradient Clipped clips the gradients of private rows, and the fit has none: give "
                "it private rows, or leave the rule out"
            )
        private: Tensor | None = None
        public: Tensor | None = None
        for name, loss in losses.items():
            read = rows.read(name, loss)
            if isinstance(read, WholeStep):
                raise ValueError(
                    f"loss {name!r} compares the rows of a step (WholeStep), so no row has a "
                    "gradient of its own that gradient Clipped could clip: use a loss of each row, "
                    "or another rule"
                )
            if read.of == "private":
                values = read.row_losses(rows.counted.get("private"))
                private = values if private is None else private + values
            else:
                mean = read.mean(rows.counted.get("public"))
                public = mean if public is None else public + mean
        if private is None:
            like = public if public is not None else torch.zeros(())
            private = like.new_zeros(rows.sizes["private"])
        return cls(private, public, rows.means(losses))

    def weighted(self, shares: Float[Tensor, "*members rows"]) -> Float[Tensor, ""]:
        """Return what one backward pass is taken of: private rows by their shares, and public."""
        loss = (shares.detach() * self.private).sum()
        return loss if self.public is None else loss + self.public.sum()

    def weighted_gradients(
        self, shares: Float[Tensor, "*members rows"], weights: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Return the gradients of `weighted`; None each where no loss is in force."""
        loss = self.weighted(shares)
        if not loss.requires_grad:
            return [None] * len(weights)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            loss, weights, retain_graph=True, allow_unused=True
        )
        return gradients

    def public_gradients(self, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """Return the gradients of the public part alone."""
        if self.public is None:
            return [None] * len(weights)
        gradients: Sequence[Tensor | None] = torch.autograd.grad(
            self.public.sum(), weights, retain_graph=True, allow_unused=True
        )
        return gradients


def check_rows_alone(
    losses: Mapping[str, Loss],
    rows: StepRows,
    of_one: Mapping[str, Loss],
    one: StepRows,
) -> None:
    """Refuse losses in which private rows of a step see each other, or public rows see them.

    No gradient tells: a mean over the step that is held constant is enough to let one row move
    what the others' gradients are.

    Args:
        losses: of a step.
        rows: of the step, the first of which counts.
        of_one: the same losses where the step has its first private row alone, beside the same
            public rows.
        one: rows of that step.

    Raises:
        ValueError: naming the loss.
    """
    for name, loss in losses.items():
        whole, alone = rows.read(name, loss), one.read(name, of_one[name])
        if isinstance(whole, WholeStep) or isinstance(alone, WholeStep):
            continue
        if whole.of == "private":
            what = "of private rows depends on which other private rows"
            first = whole.row_losses(rows.counted.get("private"))[0]
            same = alone.row_losses()[0]
        else:
            what = "of public rows depends on which private rows"
            first = whole.mean(rows.counted.get("public"))
            same = alone.mean(one.counted.get("public"))
        if not torch.isclose(first, same, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise ValueError(
                f"loss {name!r} {what} are in the step, so clipping does not bound what a row "
                "does: compute it, and its weights, from each row by itself"
            )


class Clipping:
    """Which models of a fit have the gradients of their rows clipped, and how each of them is.

    Args:
        rules: of each model that learns.
        models: those models.
        has_parts: whether something is trained beside them.

    Attributes:
        by_norms: rules of models whose norms are measured.
        row_by_row: rules of models for which every row's gradient is made.
        norms: measures; None where no model is measured.

    Raises:
        ValueError: as `check_rows_apart`.
    """

    def __init__(
        self,
        rules: Mapping[str, GradientRule],
        models: Mapping[str, nn.Module],
        *,
        has_parts: bool,
    ) -> None:
        self._rules = list(rules.values())
        clipped = {name: rule for name, rule in rules.items() if isinstance(rule, Clipped)}
        for name, rule in clipped.items():
            check_rows_apart(rule, {name: models[name]}, has_parts=has_parts)
        self.by_norms = {name: rule for name, rule in clipped.items() if rule.method == "norms"}
        self.row_by_row = {name: rule for name, rule in clipped.items() if rule.method == "vmap"}
        self.norms = (
            RowNorms({name: models[name] for name in self.by_norms}) if self.by_norms else None
        )

    def __bool__(self) -> bool:
        return bool(self.by_norms or self.row_by_row)

    def noise(
        self,
        members: Sequence[int],
        shapes: Sequence[torch.Size],
        like: Tensor,
        turned: Sequence[bool] | None = None,
    ) -> Noise | None:
        """Return what is added to the gradients of these members, as `Noise`; None: nothing is."""
        noised = [rule for rule in self._rules if isinstance(rule, Noised)]
        if not noised:
            return None
        # Who learns with noise learns alone: a peer that sees the same rows would tell of them.
        (rule,) = noised
        return Noise(rule.for_members(members), shapes, like, turned)

    def begin(self, model: str, nudges: Mapping[str, Tensor] | None, *, apart: bool) -> None:
        """Say which model runs next."""
        if self.norms is None:
            return
        if model in self.by_norms:
            self.norms.begin(model, nudges, apart=apart)
        else:
            self.norms.look_away()


def plain_gradients(
    means: Mapping[str, Tensor], weights: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """Return the gradients of the sum of losses, of which more gradients are to be taken."""
    loss = total(means)
    if not loss.requires_grad:
        return [None] * len(weights)
    gradients: Sequence[Tensor | None] = torch.autograd.grad(
        loss, weights, retain_graph=True, allow_unused=True
    )
    return gradients


def gradient_norms(
    gradients: Mapping[str, Tensor], *, stacked: bool
) -> Float[Tensor, "*members rows"]:
    """Return the norm of every row's gradient with respect to one model.

    Args:
        gradients: ``[rows, ...]`` by parameter, ``[members, rows, ...]`` where they are stacked.
        stacked: whether they are.
    """
    rows = 2 if stacked else 1
    # A parameter may be a single number, which has nothing to be flattened.
    squares = [each.reshape(*each.shape[:rows], -1).square().sum(-1) for each in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def clipped_sums(
    rule: Clipped, gradients: Mapping[str, Tensor], norms: Float[Tensor, "*members rows"]
) -> dict[str, Tensor]:
    """Return what a rule makes of every row's gradient with respect to one model.

    Args:
        rule: what clips.
        gradients: ``[*members, rows, ...]`` by parameter.
        norms: of the gradients.
    """
    shares, rows = rule.shares(norms), norms.ndim
    return {
        name: (shares.reshape(*shares.shape, *[1] * (each.ndim - rows)) * each).sum(rows - 1)
        for name, each in gradients.items()
    }


def not_finite(norms: Sequence[Tensor]) -> Float[Tensor, "*members rows"] | None:
    """Return 1 for each row of which a norm is not finite, else 0; None where all are.

    No share makes a gradient that is not finite a bounded one: such a row has to be left out.

    Args:
        norms: of the same rows, with respect to one model each.
    """
    odd = [~torch.isfinite(each) for each in norms]
    if not any(bool(each.any()) for each in odd):
        return None
    return torch.stack(odd).any(0).to(norms[0].dtype)


def check_rows_apart(rule: Clipped, models: Mapping[str, nn.Module], *, has_parts: bool) -> None:
    """Refuse models whose rows have no gradients of their own, or none that can be measured.

    Args:
        rule: what clips them.
        models: those that learn.
        has_parts: whether terms train something beside the models.

    Raises:
        ValueError: naming the model, its layer and what would work.
    """
    if has_parts:
        raise ValueError(
            "gradient Clipped does not clip what terms train beside the models, such as "
            "projectors: use terms without them"
        )
    for name, model in models.items():
        for path, layer in model.named_modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"gradient Clipped needs rows that do not mix, but layer {path!r} of model "
                    f"{name!r} is a {type(layer).__name__}: use norm: group"
                )
        if rule.method == "norms":
            _measured_layers(name, model)


def _measured_layers(name: str, model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with parameters that learn, by module path."""
    layers: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for path, layer in model.named_modules():
        own = [each for each in layer.parameters(recurse=False) if each.requires_grad]
        if not own:
            continue
        shared = any(id(each) in seen for each in own)
        seen.update(map(id, own))
        odd = type(layer) not in MEASURES or (isinstance(layer, nn.Conv2d) and _is_odd(layer))
        if shared or odd:
            what = "shares a parameter" if shared else f"is a {type(layer).__name__}"
            raise ValueError(
                f"gradient Clipped cannot measure layer {path!r} of model {name!r}, which {what}: "
                "method='vmap' works for it"
            )
        layers[path] = layer
    return layers


def _is_odd(layer: nn.Conv2d) -> bool:
    return layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str)


class RowNorms:
    """Measures the gradients of rows without making them.

    While `watching`, every layer of the models adds a nudge of zeros to what it puts out, so the
    gradient with respect to the nudge is what comes back to the layer; with what the layer read,
    that gives the norm of each row's gradient.

    Args:
        models: those that learn, by name; several may be one module.
    """

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self._models = models
        self._layers = {name: _measured_layers(name, each) for name, each in models.items()}
        self._current = ""
        self._apart = False
        self.read: dict[str, dict[str, Tensor]] = {}
        self.nudges: dict[str, dict[str, Tensor]] = {}
        self._calls: dict[str, int] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook into the layers inside the block."""
        modules = {id(each): each for each in self._models.values()}
        handles = [
            layer.register_forward_hook(partial(self._note, path))
            for module in modules.values()
            for path, layer in _measured_layers("", module).items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(
        self, model: str, nudges: Mapping[str, Tensor] | None = None, *, apart: bool = False
    ) -> None:
        """Say which model runs next.

        Args:
            model: its name.
            nudges: zeros of the shapes of what its layers put out; None: they are made.
            apart: whether public rows follow in a pass of their own, in which nothing is noted.
        """
        self._current, self._apart = model, apart
        self.read[model], self._calls = {}, {}
        self.nudges[model] = {} if nudges is None else dict(nudges)

    def _note(
        self, path: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        if not self._current:
            return None
        calls = self._calls[path] = self._calls.get(path, 0) + 1
        if calls == 2 and self._apart:
            return None
        if calls > 1:
            raise ValueError(
                f"gradient Clipped cannot measure layer {path!r} of model {self._current!r}, which "
                "runs more than once in a step: method='vmap' works for it"
            )
        self.read[self._current][path] = inputs[0].detach()
        nudges = self.nudges[self._current]
        if path not in nudges:
            nudges[path] = torch.zeros_like(output, requires_grad=True)
        return output + nudges[path]

    def look_away(self) -> None:
        """Note nothing of what runs next."""
        self._current = ""

    def end(self) -> None:
        """Note nothing more, and forget what was noted."""
        self._current = ""
        self.read, self.nudges = {}, {}

    def shapes(self, model: str, run: Callable[[], object]) -> dict[str, tuple[int, ...]]:
        """Return what each layer puts out for one row, found by running the model.

        Args:
            model: its name.
            run: runs it on some rows.
        """
        self.begin(model)
        with torch.no_grad():
            run()
        shapes = {path: tuple(nudge.shape[1:]) for path, nudge in self.nudges[model].items()}
        self.end()
        return shapes

    def came_back(self, private: Tensor) -> dict[str, dict[str, Tensor | None]]:
        """Return the gradient of all rows' losses with respect to what each layer put out."""
        named = [
            (model, path, nudge)
            for model, nudges in self.nudges.items()
            for path, nudge in nudges.items()
        ]
        if not private.requires_grad:
            return {model: dict.fromkeys(nudges) for model, nudges in self.nudges.items()}
        found = torch.autograd.grad(
            private.sum(), [nudge for *_, nudge in named], retain_graph=True, allow_unused=True
        )
        back: dict[str, dict[str, Tensor | None]] = {model: {} for model in self.nudges}
        for (model, path, _), gradient in zip(named, found, strict=True):
            back[model][path] = gradient
        return back

    def norms(
        self,
        model: str,
        read: Mapping[str, Tensor],
        came_back: Mapping[str, Tensor | None],
        num_private: int,
        *,
        stacked: bool,
    ) -> Float[Tensor, "*members private"]:
        """Return the norm of each private row's gradient with respect to a model's parameters.

        Args:
            model: its name.
            read: what each layer read, ``[*members, rows, ...]``.
            came_back: the gradient with respect to what it put out; None where none did.
            num_private: rows to look at; they come first.
            stacked: whether members come before the rows.
        """
        rows = 1 if stacked else 0
        total: Tensor | None = None
        for path, layer in self._layers[model].items():
            gradient = came_back.get(path)
            if gradient is None:
                continue
            # Members and rows side by side; only the rows that were asked about.
            inputs, own = (
                each.narrow(rows, 0, num_private).flatten(0, rows)
                for each in (read[path], gradient)
            )
            shape = (*gradient.shape[:rows], num_private)
            squares = MEASURES[type(layer)](layer, inputs, own).reshape(shape)
            total = squares if total is None else total + squares
        if total is None:
            # No loss of private rows reaches this model.
            some = next(iter(read.values()))
            return some.new_zeros((*some.shape[:rows], num_private))
        # Where what comes back to many positions cancels out, rounding may leave less than nothing.
        return torch.where(total < 0, torch.zeros_like(total), total).sqrt()


def linear_squares(
    layer: nn.Module, read: Float[Tensor, "rows *_"], back: Float[Tensor, "rows *_"]
) -> Float[Tensor, " rows"]:
    """Return the squared norms of a linear layer's row gradients.

    A row's gradient is the sum over positions of ``back x read``; without positions its norm is
    the product of both norms.
    """
    if read.ndim == 2:
        squares = read.square().sum(1) * back.square().sum(1)
        return _with_bias(layer, squares, back)
    read, back = read.flatten(1, -2), back.flatten(1, -2)
    return _with_bias(layer, _outer_squares(back, read), back.sum(1))


def _conv_squares(layer: nn.Module, read: Tensor, back: Tensor) -> Tensor:
    assert isinstance(layer, nn.Conv2d)  # noqa: S101
    patches = F.unfold(
        read,
        layer.kernel_size,
        dilation=layer.dilation,
        padding=layer.padding,  # type: ignore[arg-type]
        stride=layer.stride,
    )
    back = back.flatten(2)
    return _with_bias(layer, _outer_squares(back.mT, patches.mT), back.sum(2))


def _group_norm_squares(layer: nn.Module, read: Tensor, back: Tensor) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)  # noqa: S101
    normalised = F.group_norm(read, layer.num_groups, eps=layer.eps)
    by_channel = (len(read), layer.num_channels, -1)
    slopes = (normalised * back).reshape(by_channel).sum(2)
    return _with_bias(layer, slopes.square().sum(1), back.reshape(by_channel).sum(2))


def _layer_norm_squares(layer: nn.Module, read: Tensor, back: Tensor) -> Tensor:
    assert isinstance(layer, nn.LayerNorm)  # noqa: S101
    normalised = F.layer_norm(read, layer.normalized_shape, eps=layer.eps)
    by_feature = (len(read), -1, math.prod(layer.normalized_shape))
    slopes = (normalised * back).reshape(by_feature).sum(1)
    return _with_bias(layer, slopes.square().sum(1), back.reshape(by_feature).sum(1))


def _embedding_squares(layer: nn.Module, read: Tensor, back: Tensor) -> Tensor:
    """A token that stands several times in a text gets the sum of what comes back to each."""
    same = (read[:, :, None] == read[:, None, :]).to(back.dtype)
    return _with_bias(layer, ((back @ back.mT) * same).sum((1, 2)), back.sum(1))


def _outer_squares(
    back: Float[Tensor, "rows positions outputs"], read: Float[Tensor, "rows positions inputs"]
) -> Float[Tensor, " rows"]:
    """Return the squared norms of ``sum over positions of back x read``, the cheaper way."""
    positions = back.shape[1]
    if positions**2 <= back.shape[2] * read.shape[2]:
        return ((back @ back.mT) * (read @ read.mT)).sum((1, 2))
    return (back.mT @ read).square().sum((1, 2))


def _with_bias(
    layer: nn.Module, squares: Float[Tensor, " rows"], slopes: Float[Tensor, "rows outputs"]
) -> Float[Tensor, " rows"]:
    """Leave out a weight that does not learn, and add a bias that does."""
    if not (isinstance(layer.weight, Tensor) and layer.weight.requires_grad):
        squares = torch.zeros_like(squares)
    bias = getattr(layer, "bias", None)
    return squares + slopes.square().sum(1) if bias is not None and bias.requires_grad else squares


Measure = Callable[[nn.Module, Tensor, Tensor], Tensor]

MEASURES: dict[type[nn.Module], Measure] = {
    nn.Linear: linear_squares,
    nn.Conv2d: _conv_squares,
    nn.GroupNorm: _group_norm_squares,
    nn.LayerNorm: _layer_norm_squares,
    nn.Embedding: _embedding_squares,
}
"""Squared norms of each row's gradient, from a layer, what it read and what came back to it.

Exact types only: a subclass may do something else.
"""
