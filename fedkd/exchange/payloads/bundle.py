"""Bundles: several payloads that travel together."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedkd.exchange.payload import Asked, Payload


@dataclass(frozen=True, kw_only=True)
class Bundle(Payload):
    """Several payloads by name.

    Attributes:
        parts: the payloads; names without a slash.
    """

    kind: ClassVar[str] = "bundle"
    adds_up: ClassVar[bool] = True

    parts: Mapping[str, Payload]

    def __getitem__(self, name: str) -> Payload:
        return self.parts[name]

    @property
    def label(self) -> str:
        """The labels of the parts, joined by ``+``."""
        return "+".join(part.label for part in self.parts.values())

    @property
    def payload_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.payload_bytes for part in self.parts.values())

    @classmethod
    def asked(cls, **parts: Asked) -> Asked:
        """Describe a bundle by what each of its parts has to be."""
        limits = {
            f"parts/{name}/{place}": limit
            for name, asked in parts.items()
            for place, limit in asked.limits.items()
        }
        optional = frozenset(
            f"parts/{name}/{place}" for name, asked in parts.items() for place in asked.optional
        )
        about: dict[str, Any] = {"parts": parts}
        return Asked(kind=cls, limits=limits, optional=optional, about=about)

    def problem(self, asked: Asked) -> str | None:
        """Return what is wrong with the first part that is no good, or None."""
        expected: Mapping[str, Asked] = asked.about["parts"]
        if self.parts.keys() != expected.keys():
            return f"parts {sorted(self.parts)[:5]}, expected {sorted(expected)}"
        for name, part in self.parts.items():
            wanted = expected[name].kind
            if type(part) is not wanted:
                return f"{name}: {part.kind}, expected {wanted.kind}"
            reason = part.problem(expected[name])
            if reason is not None:
                return f"{name}: {reason}"
        return None

    def votes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the votes of the first part that has any."""
        return next((v for part in self.parts.values() if (v := part.votes()) is not None), None)

    def answers(self) -> tuple[np.ndarray, np.ndarray, bool] | None:
        """Return the answers of the first part that has any."""
        return next((a for part in self.parts.values() if (a := part.answers()) is not None), None)

    def targets_entropy(self) -> float | None:
        """Return the entropy of the first part that teaches soft labels."""
        return next(
            (e for part in self.parts.values() if (e := part.targets_entropy()) is not None), None
        )

    def weighted(self, weight: int | float) -> "Bundle":
        """Weight each part."""
        return replace(self, parts={n: part.weighted(weight) for n, part in self.parts.items()})

    def plus(self, other: Payload) -> "Bundle":
        """Add up each part."""
        if not isinstance(other, Bundle) or self.parts.keys() != other.parts.keys():
            raise ValueError("bundles of different parts cannot be added up")
        return replace(self, parts={n: part.plus(other[n]) for n, part in self.parts.items()})

    def over(self, weight: int | float, like: Payload) -> "Bundle":
        """Return the mean of each part."""
        if not isinstance(like, Bundle):
            raise TypeError(f"expected a bundle, got {like.kind}")
        return replace(self, parts={n: p.over(weight, like[n]) for n, p in self.parts.items()})
