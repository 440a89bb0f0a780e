"""Numbers: a few of them beside something larger."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedkd.exchange.payload import Asked, Limit, Payload

LARGEST_NUMBER = 1e6
"""Numbers beyond this are refused unless more is asked for."""


@dataclass(frozen=True, kw_only=True)
class Numbers(Payload):
    """A few numbers whose meaning the algorithm knows, such as a loss or a weight.

    Attributes:
        values: float32 ``[count]``; four bytes each.
    """

    kind: ClassVar[str] = "numbers"

    values: np.ndarray

    @classmethod
    def of(cls, *numbers: float) -> "Numbers":
        """Hold these numbers."""
        return cls(values=np.array(numbers, np.float32))

    def __getitem__(self, place: int) -> float:
        return float(self.values[place])

    @classmethod
    def asked(
        cls,
        count: int,
        *,
        smallest: float = 0.0,
        largest: float = LARGEST_NUMBER,
        subject: str = "a number",
    ) -> Asked:
        """Describe one client's numbers.

        Args:
            count: how many there are.
            smallest: of each.
            largest: of each.
            subject: what one of them is called in a message.
        """
        limit = Limit(
            shape=(count,),
            smallest=smallest,
            largest=largest,
            subject=subject,
            where="among the numbers",
        )
        return Asked(kind=cls, limits={"values": limit})
