"""What a server remembers that teaches everybody the same: one lesson on public rows."""

from dataclasses import dataclass

from fedkd.exchange.payloads import Predictions
from fedkd.exchange.values import Value


@dataclass(frozen=True)
class Lesson(Value):
    """What all clients receive.

    Attributes:
        predictions: what they learn; None before anybody has sent anything.
    """

    predictions: Predictions | None = None

    @property
    def for_all(self) -> str | None:
        """The name of what every client receives; None where that is nothing."""
        return None if self.predictions is None else "lesson"

    @property
    def taught(self) -> Predictions:
        """What is taught.

        Raises:
            ValueError: there is nothing yet.
        """
        if self.predictions is None:
            raise ValueError("there is no lesson yet")
        return self.predictions
