"""How rows became inputs, as far as the next rows of the same kind need it."""

from dataclasses import dataclass

from fedkd.data.features import FeatureColumn
from fedkd.data.texts import Characters, HashedGrams


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of a table became inputs.

    Attributes:
        column: that holds pictures or texts; None where there is none, as in folders and arrays.
        columns: that hold features, in their order, each with its categories.
        encoder: of texts.
    """

    column: str | None = None
    columns: tuple[FeatureColumn, ...] = ()
    encoder: Characters | HashedGrams | None = None

    @property
    def width(self) -> int | None:
        """How long an input gets; None where this does not say it."""
        match self.encoder:
            case Characters():
                return self.encoder.length
            case HashedGrams():
                return self.encoder.places
        return sum(column.width for column in self.columns) or None

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What each feature of an input is: a column, ``column=category`` or ``column[place]``."""
        return tuple(name for column in self.columns for name in column.feature_names)


AS_IT_IS = Reading()
"""Of pictures in files and of arrays: nothing has to be known."""
