"""Small modules that a fit trains beside a client's models, such as a projection between widths.

Each client has its own. They learn in the same steps, are kept with the client's state and are sent
only where an algorithm asks for them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from zlib import crc32

from torch import Tensor, nn

from fedkd.objectives import Parts
from fedkd.randomness import Purpose, seeded_torch, torch_seed_for
from fedkd.training.state import Arrays, to_arrays

NewParts = Mapping[str, Callable[[], nn.Module]]
"""How to make each part, by its name; the weights of a client's come from the client's seed."""

OWN = "parts"
"""What the parts of a fit are called in a client's state, beside those of terms: no learner, after
which theirs are called, may have this name."""

_UNEQUAL = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)


class FitParts:
    """The parts of one fit.

    Attributes:
        parts: the modules, as they are called in a client's state.

    Raises:
        ValueError: for a name that no part can have, and for modules that cannot be a part.
    """

    def __init__(self, new: NewParts) -> None:
        self._new = dict(sorted(new.items()))
        odd = [name for name in new if not name or "." in name or "/" in name]
        if odd:
            raise ValueError(f"a part needs a name without '.' and '/', got {odd[0]!r}")
        self.parts = self._made(0)
        for name, part in self._called.items():
            for path, layer in part.named_modules():
                if isinstance(layer, _UNEQUAL):
                    raise ValueError(
                        f"part {name!r} cannot have the {type(layer).__name__} {path!r}: rows of "
                        "stacked clients would mix, or be dropped otherwise; use LayerNorm, or none"
                    )
            if not any(weight.requires_grad for weight in part.parameters()):
                raise ValueError(
                    f"part {name!r} has no parameters that learn: call a function in the objective"
                )

    @property
    def _called(self) -> Mapping[str, nn.Module]:
        return {name: self.parts.get_submodule(f"{OWN}.{name}") for name in self._new}

    def _made(self, seed: int) -> nn.ModuleDict:
        made = {}
        for name, new in self._new.items():
            with seeded_torch(torch_seed_for(seed, Purpose.MODEL, 0, crc32(name.encode()))):
                made[name] = new()
        return nn.ModuleDict({OWN: nn.ModuleDict(made)})

    def initial_parts(self, seed: int) -> Arrays:
        """Return fresh weights; ``seed`` is that of a client's first weights."""
        state = self._made(seed).state_dict()
        return to_arrays(state)

    @property
    def called(self) -> Parts:
        """The parts as an objective calls them: as the modules that they are."""
        return Parts(lambda name, *inputs: self._called[self._known(name)](*inputs))

    def parts_with(self, run: Callable[..., Tensor]) -> Parts:
        """Return the parts as an objective calls them, each run by ``run(path, *inputs)``."""
        return Parts(partial(self._call, run))

    def _call(self, run: Callable[..., Tensor], name: str, *inputs: Any) -> Tensor:
        return run(f"{OWN}.{self._known(name)}", *inputs)

    def _known(self, name: str) -> str:
        if name not in self._new:
            raise ValueError(f"unknown part {name!r}; the fit has {', '.join(self._new)}")
        return name


def part_in(weights: Arrays, name: str) -> Arrays | None:
    """Return copies of one part's weights, out of all parts of a client; None where it has none."""
    prefix = f"{OWN}.{name}."
    found = {
        path.removeprefix(prefix): array.copy()
        for path, array in weights.items()
        if path.startswith(prefix)
    }
    return found or None
