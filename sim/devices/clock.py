"""A simulated clock: how long rounds would take if clients computed and sent at stated speeds.

What a client does in a round is counted, not timed: operations of its models, from torch's own
counter, and bytes as they are encoded. So the same settings and seed give the same seconds on any
machine, in any backend, and in a resumed run::

    seconds = latency_s + bytes down / down + operations / speed + latency_s + bytes up / up
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedkd.bounds import Real, Share, shown
from fedkd.compression.cost import row_flops
from fedkd.models import build_model
from fedkd.randomness import Purpose, generator_for
from fedkd.training import Network, RowFlops, Work

_SLOWEST, _FASTEST = 1.0, 1e18


class LogNormal(BaseModel):
    """Rates drawn once for each client: ``median * exp(sigma * z)`` with z standard normal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: Real = Field(ge=_SLOWEST, le=_FASTEST)
    sigma: Real = Field(1.0, ge=0, le=5)


class Device(NamedTuple):
    """What a kind of device is capable of.

    Attributes:
        speed: floating-point operations a second.
        up, down: bytes a second.
    """

    speed: float
    up: float
    down: float


Profile = Literal["board", "phone", "laptop", "server"]

_SUSTAINED = 0.1
"""What training reaches of a processor's peak: an assumption, small models reach less."""
_MEGABIT = 1e6 / 8

PROFILES: Mapping[Profile, Device] = MappingProxyType(
    {
        "board": Device(_SUSTAINED * 4 * 1.5e9 * 8, up=5 * _MEGABIT, down=10 * _MEGABIT),
        "phone": Device(_SUSTAINED * 4 * 2.8e9 * 16, up=3 * _MEGABIT, down=35 * _MEGABIT),
        "laptop": Device(_SUSTAINED * 4 * 1.6e9 * 32, up=20 * _MEGABIT, down=100 * _MEGABIT),
        "server": Device(_SUSTAINED * 19.5e12, up=500 * _MEGABIT, down=1000 * _MEGABIT),
    }
)
"""Kinds of devices, for studies that need plausible ratios.

Speeds are a tenth of a peak in float32, which is cores x clock x operations a cycle: ``board``
four Cortex-A72 at 1.5 GHz (Raspberry Pi 4), ``phone`` the four large cores of a Snapdragon 845 at
2.8 GHz, ``laptop`` an Intel i5-8250U at its base clock of 1.6 GHz with AVX2, ``server`` an NVIDIA
A100, whose data sheet says 19.5 TFLOP/s.

Bandwidths, down and up: ``board`` LTE Category 1, 10 and 5 Mbit/s (3GPP TS 36.306); ``phone`` 35
and 3 Mbit/s, ``laptop`` 100 and 20 Mbit/s, ``server`` 1000 and 500 Mbit/s: what the FCC's 2024
Section 706 report (GN Docket No. 22-270) measures mobile 5G-NR by, fixed lines by, and sets as the
aim of fixed lines in the long run.
"""

_PerSecond = Annotated[Real, Field(ge=_SLOWEST, le=_FASTEST)]
Rate: TypeAlias = _PerSecond | tuple[_PerSecond, ...] | LogNormal
"""A number for all clients, a list that is dealt out in turn, or a distribution."""


class ClockSettings(BaseModel):
    """A simulated clock (``clock``); off where nothing is said of clients. Costs no bit when off.

    With a deadline, who would be late is left out of the round: its reply does not count, and it
    stops, so its model stays as it was. That is what happens at ``engine.deadline_s``, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    profiles: tuple[Profile, ...] | None = Field(
        None,
        max_length=1000,
        description="kinds of devices, dealt out in turn: client i gets profiles[i % their number]",
    )
    speed: Rate | None = Field(
        None,
        description="FLOP/s of clients, over the profile's: a number, a list dealt out in turn, or "
        "`{median, sigma}` of a log-normal distribution; none: the profile's, or no time at all",
    )
    up: Rate | None = Field(None, description="bytes/s that clients send, said in the same way")
    down: Rate | None = Field(None, description="bytes/s that clients receive")
    latency_s: Real = Field(
        0.0, ge=0, le=86_400, description="seconds of each way, once down and once up in a round"
    )
    server_speed: Real | None = Field(
        None,
        ge=_SLOWEST,
        le=_FASTEST,
        description="FLOP/s of the server, where it trains or predicts; none: no time at all",
    )
    deadline_s: Real | None = Field(
        None,
        ge=1e-9,
        le=31_536_000,
        description="simulated seconds after which a client is left out of the round, and stops; "
        "none: the round waits for everybody who answers",
    )
    target_accuracy: Share | None = Field(
        None,
        description="tables say after how many simulated seconds the mean client first had it, on "
        "the test split at the end of a round that was judged",
    )

    @field_validator("profiles", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("profiles")
    @classmethod
    def _some(cls, value: tuple[Profile, ...] | None) -> tuple[Profile, ...] | None:
        if value == ():
            raise ValueError(f"need at least one of {', '.join(get_args(Profile))}, got none")
        return value

    @field_validator("speed", "up", "down", mode="before")
    @classmethod
    def _a_rate(cls, value: object) -> object:
        if value is None or isinstance(value, LogNormal):
            return value
        if isinstance(value, Mapping):
            try:
                return LogNormal.model_validate(value)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                raise ValueError(f"{where}: {first['msg']}, got {shown(value)}") from None
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        good = [
            number
            for number in numbers
            if isinstance(number, int | float)
            and not isinstance(number, bool)
            and _SLOWEST <= number <= _FASTEST
        ]
        if not numbers or len(good) < len(numbers) or len(numbers) > 100_000:
            raise ValueError(
                f"must be a number from {_SLOWEST:g} to {_FASTEST:g}, a list of them, or "
                f"{{median: ..., sigma: ...}}, got {shown(value)}"
            )
        rates = tuple(float(number) for number in good)
        return rates if isinstance(value, list | tuple) else rates[0]

    @model_validator(mode="after")
    def _says_something_of_clients(self) -> "ClockSettings":
        said = [
            name
            for name in ("server_speed", "deadline_s", "target_accuracy")
            if getattr(self, name) is not None
        ]
        if (said or self.latency_s) and not self.on:
            raise ValueError(
                f"clock.{said[0] if said else 'latency_s'} needs a clock: say how fast clients are "
                "by clock.profiles, clock.speed, clock.up or clock.down"
            )
        return self

    @property
    def on(self) -> bool:
        """Whether there is a clock."""
        return any(value is not None for value in (self.profiles, self.speed, self.up, self.down))


class RowCosts(dict[Network, RowFlops]):
    """Operations of a row of each network: counted when they are first asked for, then known."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self._num_classes = num_classes

    def __missing__(self, network: Network) -> RowFlops:
        module = build_model(
            network.model, input_shape=network.input_shape, num_classes=self._num_classes, seed=0
        )
        self[network] = row_flops(module, network.input_shape)
        return self[network]


@dataclass(frozen=True, slots=True)
class Spent:
    """What a client's round took.

    Attributes:
        flops: operations of its models.
        seconds: simulated.
    """

    flops: int
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """As they stand in a client's row of metrics."""
        return {"gflops": self.flops / 1e9, "simulated_s": self.seconds}


class Clock:
    """Says how long clients and server take: a pure function of settings and seed.

    Args:
        settings: there is a clock.
        clients: how many there are.
        seed: of the run.
        num_classes: of the run's data.
    """

    def __init__(
        self, settings: ClockSettings, *, clients: int, seed: int, num_classes: int
    ) -> None:
        self._settings = settings
        self._costs = RowCosts(num_classes)
        devices = [PROFILES[name] for name in settings.profiles or ()]

        def rates(place: int, rate: Rate | None) -> np.ndarray:
            if isinstance(rate, LogNormal):
                draws = generator_for(seed, Purpose.DEVICES, place).standard_normal(clients)
                return rate.median * np.exp(rate.sigma * draws)
            if rate is None:
                rate = tuple(device[place] for device in devices) or math.inf
            return np.resize(np.asarray(rate, np.float64), clients)

        self._speed = rates(0, settings.speed)
        self._up = rates(1, settings.up)
        self._down = rates(2, settings.down)

    @property
    def deadline_s(self) -> float | None:
        """After how long a client is left out."""
        return self._settings.deadline_s

    def device(self, client: int) -> Device:
        """Return what a client is capable of; infinite where nothing is said of it."""
        return Device(*(float(rates[client]) for rates in (self._speed, self._up, self._down)))

    def spent(
        self, client: int, work: Work, *, bytes_down: int, bytes_up: int, delay_s: float = 0.0
    ) -> Spent:
        """Return what a client's round takes.

        Args:
            client: who.
            work: what it did.
            bytes_down: that it received, as they are encoded.
            bytes_up: that it sends.
            delay_s: by how much it starts late.
        """
        device, flops = self.device(client), work.flops(self._costs)
        ways = bytes_down / device.down + bytes_up / device.up + 2 * self._settings.latency_s
        return Spent(flops, delay_s + ways + flops / device.speed)

    def server_seconds(self, work: Work) -> float:
        """Return how long the server takes for what it did."""
        speed = self._settings.server_speed
        return 0.0 if speed is None else work.flops(self._costs) / speed

    def too_late(self, seconds: float) -> str | None:
        """Return why a client that takes so long is left out of the round, or None."""
        deadline = self._settings.deadline_s
        if deadline is None or seconds <= deadline:
            return None
        return (
            f"late: done after {seconds:.4g} simulated seconds, clock.deadline_s = "
            f"{deadline:g}; it stopped there, and its model stays as it was"
        )


_LATE = re.compile(r"late: done after (\S+) simulated seconds, clock\.deadline_s = ")


def late_seconds(reason: str) -> float | None:
    """Return after how long a client would have been done, by the reason of `Clock.too_late`.

    Args:
        reason: why a client's answer does not count; anything but such a reason gives None.
    """
    found = _LATE.match(reason)
    return None if found is None else float(found[1])


def deadline_for(seconds: float) -> float:
    """Return a deadline that who takes so long keeps, with three digits and some room."""
    size = 10.0 ** (math.floor(math.log10(seconds)) - 2)
    return float(f"{math.ceil(1.001 * seconds / size) * size:.3g}")
