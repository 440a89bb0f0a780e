"""Running federations: settings, command line, engine, run folders, studies and reports."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkd.distillation.settings import DistillSettings
    from sim.commands.distilling.running import distill
    from sim.commands.doctor import doctor
    from sim.commands.models import load_model
    from sim.commands.overview import data
    from sim.commands.running import run
    from sim.commands.study import compare
    from sim.commands.watch import watch
    from sim.contract import check_strategy
    from sim.publishing.bundle import bundle
    from sim.publishing.figures import figures
    from sim.publishing.methods import cite
    from sim.publishing.tables import table
    from sim.reports import report
    from sim.reports.costs import cost
    from sim.reports.rankings import ranks
    from sim.scaffold import new
    from sim.settings import Settings, SettingsError, load_distill_settings, load_settings

# Nothing that we start reports to anybody; both are read when Flower and Ray are imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# On one machine Ray's own servers, which authenticate nobody, listen on the loopback only. The
# switch is named after the systems where that is Ray's default; "1" puts them on the network.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# Ray's workers step back behind every other program (niceness 15); a run's are what one waits for.
os.environ.setdefault("RAY_worker_niceness", "0")
# Workers without a GPU share choose the CPU themselves; Ray warns about hiding the GPUs for them.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

_FUNCTIONS = {
    "run": "sim.commands.running",
    "compare": "sim.commands.study",
    "watch": "sim.commands.watch",
    "distill": "sim.commands.distilling.running",
    "data": "sim.commands.overview",
    "doctor": "sim.commands.doctor",
    "report": "sim.reports",
    "cost": "sim.reports.costs",
    "ranks": "sim.reports.rankings",
    "table": "sim.publishing.tables",
    "figures": "sim.publishing.figures",
    "cite": "sim.publishing.methods",
    "bundle": "sim.publishing.bundle",
    "new": "sim.scaffold",
    "load_model": "sim.commands.models",
    "check_strategy": "sim.contract",
    "Settings": "sim.settings",
    "SettingsError": "sim.settings",
    "load_settings": "sim.settings",
    "DistillSettings": "fedkd.distillation.settings",
    "load_distill_settings": "sim.settings",
}
"""What a notebook needs: a function for every command, the settings, and the contract test."""

__all__ = [
    "DistillSettings",
    "Settings",
    "SettingsError",
    "bundle",
    "check_strategy",
    "cite",
    "compare",
    "cost",
    "data",
    "distill",
    "doctor",
    "figures",
    "load_distill_settings",
    "load_model",
    "load_settings",
    "new",
    "ranks",
    "report",
    "run",
    "table",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Import a command's function when it is first asked for: PyTorch and Ray take seconds."""
    if name not in _FUNCTIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FUNCTIONS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS})
