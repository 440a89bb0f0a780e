"""Settings of attacks: ``attacks:`` of a run or study, and words of ``fedkd attack``."""

from collections.abc import Mapping
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedkd.bounds import Count, Few, Share, Whole, shown

AttackKind = Literal["membership", "labels", "inversion", "stealing"]
KINDS: tuple[AttackKind, ...] = get_args(AttackKind)
_Client = Annotated[Whole, Field(ge=0, le=99_999)]


class AttackSettings(BaseModel):
    """Which attacks are made on a finished run, and how (``attacks``).

    A list of kinds, or ``all``, stands for a table with these ``kinds``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: tuple[AttackKind, ...] = Field(
        (),
        max_length=4,
        description="which attacks are made after a run: all, or some of "
        "membership, labels, inversion, stealing",
    )
    clients: tuple[_Client, ...] | Few | None = Field(
        None,
        description="whose private rows are attacked: a list; a number: so many, the first ones; "
        "none: all honest ones",
    )
    shadows: Whole = Field(
        16,
        ge=4,
        le=4096,
        description="shadows of each client: half of them have a row, half do not; even",
    )
    train: Literal["federations", "models"] = Field(
        "federations",
        description="what a shadow is. federations: the client in the whole run, done again; "
        "models: its architecture, trained as long by itself, which is weaker, and made once for "
        "all runs whose clients learn alike",
    )
    student_epochs: Count = Field(
        30, description="passes over public rows of a model that learns from soft labels"
    )
    controls: Whole = Field(
        32, ge=16, le=1024, description="models of the positive control of membership; even"
    )
    wrong: Share = Field(
        0.5, description="share of wrong labels that models of the positive control memorise"
    )

    @model_validator(mode="before")
    @classmethod
    def _kinds_alone(cls, given: object) -> object:
        if given is None or isinstance(given, str | list | tuple):
            given = {"kinds": given}
        if not isinstance(given, Mapping):
            return given
        kinds = given.get("kinds", ())
        if kinds is None or kinds == "none":
            kinds = ()
        elif kinds == "all":
            kinds = KINDS
        elif isinstance(kinds, str):
            kinds = tuple(kind.strip() for kind in kinds.split(","))
        odd = (
            [kind for kind in kinds if kind not in KINDS] if isinstance(kinds, list | tuple) else []
        )
        if odd:
            raise ValueError(
                f"attacks must be all or some of {', '.join(KINDS)}, got {shown(odd[0])}"
            )
        return {**given, "kinds": kinds}

    @model_validator(mode="after")
    def _each_client_once(self) -> "AttackSettings":
        named = self.clients
        if isinstance(named, tuple) and not 0 < len(named) == len(set(named)):
            raise ValueError(
                "attacks.clients must name one client or several, each once, or how many, got "
                f"{shown(list(named))}"
            )
        return self

    @model_validator(mode="after")
    def _are_even(self) -> "AttackSettings":
        for name in ("shadows", "controls"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"attacks.{name} must be even, since every row is in half of them, got "
                    f"{getattr(self, name)}"
                )
        return self
