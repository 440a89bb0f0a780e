"""What a payload passes, and what is refused of that before a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedkd.exchange.adversaries import Adversary, NoAdversary
from fedkd.exchange.codecs import Codec, Float32
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.release import (
    NoRelease,
    ReleaseRule,
    Where,
)
from fedkd.exchange.spending import PrivacyBudget
from fedkd.exchange.views import All, View, Weighting


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What a payload passes.

    Attributes:
        up: codec of what clients send.
        down: codec of what the server sends.
        view: what the server sees of the answers.
        release: how what is released is protected.
        where: who protects it: each client its answer, or a trusted server the mean of all.
        delta: of the guarantee.
        budget: that no client's releases may exceed; None: there is none.
        adversary: who sends something else, or learns from something else.
        controlled: its clients.
    """

    up: Codec = field(default_factory=Float32)
    down: Codec = field(default_factory=Float32)
    view: View = field(default_factory=All)
    release: ReleaseRule = field(default_factory=NoRelease)
    where: Where = "client"
    delta: int | float = 1e-5
    budget: PrivacyBudget | None = None
    adversary: Adversary = field(default_factory=NoAdversary)
    controlled: frozenset[int] = frozenset()

    @property
    def remember(self) -> bool:
        """Whether a codec has a memory, so that clients' states hold arrays of it."""
        return self.up.remembers or self.down.remembers

    def check(
        self,
        *,
        up: Iterable[type[Payload]],
        down: Iterable[type[Payload]],
        sums: Weighting | None,
    ) -> None:
        """Refuse, before any worker starts, what cannot work with an algorithm.

        Args:
            up: kinds that clients may send.
            down: kinds that the server may send.
            sums: how the algorithm weights clients in a mean, where it needs no more than that.

        Raises:
            ValueError: names the setting and what would work.
        """
        up, down = list(up), list(down)
        reasons = [
            *(("exchange.up", self.up.refuses(kind)) for kind in up),
            *(("exchange.down", self._refused_down(kind)) for kind in down),
            *(("exchange.view", self.view.refuses(kind, sums)) for kind in up),
            *(("privacy.mechanism", self.release.refuses(kind, self.where)) for kind in up),
            ("exchange.up", self._unwritable()),
            ("adversary", self._nothing_to_lie_about(up)),
        ]
        for setting, reason in reasons:
            if reason is not None:
                raise ValueError(f"{setting} {self._kind_of(setting)}: {reason}")

    def check_asked(self, asked: Asked) -> None:
        """The same for what is asked for, whose parts are known.

        Raises:
            ValueError: names the setting and what would work.
        """
        try:
            self.up.asked(asked)
        except ValueError as error:
            raise ValueError(f"exchange.up {self.up.kind}: {error}") from error
        reason = self.view.refuses_asked(asked)
        if reason is not None:
            raise ValueError(f"exchange.view {self.view.kind}: {reason}")
        reason = self.release.refuses_asked(asked)
        if reason is not None:
            raise ValueError(f"privacy.mechanism {self.release.kind}: {reason}")
        reason = self.adversary.refuses_asked(asked)
        if reason is not None:
            raise ValueError(f"adversary {self.adversary.kind}: {reason}")

    def _nothing_to_lie_about(self, up: Sequence[type[Payload]]) -> str | None:
        """Return why an adversary's lies cannot reach anybody."""
        if not up and self.adversary.lies:
            return "clients send nothing that it could replace; use an algorithm whose clients do"
        reasons = [self.adversary.refuses(kind) for kind in up]
        return reasons[0] if reasons and all(reasons) else None

    def _unwritable(self) -> str | None:
        """Return why a codec cannot write what is released at a client."""
        known = self.release.codecs
        if self.where != "client" or not known or self.up.kind in known:
            return None
        return (
            f"it cannot write what privacy.mechanism {self.release.kind} releases, which are no "
            f"distributions; use one of {', '.join(sorted(known))}"
        )

    def _refused_down(self, kind: type[Payload]) -> str | None:
        if kind.is_added and not self.down.exact:
            return (
                f"clients add every {kind.kind} to what they have, so what is rounded on its way "
                "would part them from the server more and more; use float32, or another codec for "
                "exchange.up alone"
            )
        if self.down.follows:
            return (
                "it codes what changed since what came down, and nothing came before that; use "
                "float32, float16 or int8, and this codec for exchange.up"
            )
        return self.down.refuses(kind)

    def _kind_of(self, setting: str) -> str:
        stages = {
            "exchange.up": self.up,
            "exchange.down": self.down,
            "exchange.view": self.view,
            "privacy.mechanism": self.release,
            "adversary": self.adversary,
        }
        return stages[setting].kind
