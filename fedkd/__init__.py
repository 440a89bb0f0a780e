"""Knowledge distillation: losses, targets, schedules, models, data, training and metrics.

This floor stands alone: it imports neither Flower nor Ray, nor the floors above. One exception has
a name: the functions of `OFFERED`, one for each command, are those of ``sim``. They are looked up
when they are first asked for, so that ``import fedkd`` is enough, and takes no time::

    import fedkd

    result = fedkd.run(fedkd.load_settings("conf/quickstart.yaml", ["strategy.name=dml"]))
"""

# Not from `typing`: under ``python -m fedkd`` a file of the user's may be called so, and it is this
# module that is imported first.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sim import (
        DistillSettings,
        Settings,
        SettingsError,
        bundle,
        check_strategy,
        cite,
        compare,
        cost,
        distill,
        doctor,
        load_distill_settings,
        load_model,
        load_settings,
        new,
        ranks,
        report,
        run,
        table,
        watch,
    )
    from sim import data as data_overview
    from sim import figures as study_figures

OFFERED = {
    "run": "run",
    "compare": "compare",
    "watch": "watch",
    "distill": "distill",
    # `fedkd.data` is the package of data sets.
    "data_overview": "data",
    "doctor": "doctor",
    "report": "report",
    "cost": "cost",
    "ranks": "ranks",
    "table": "table",
    # `fedkd.figures` is a package too.
    "study_figures": "figures",
    "cite": "cite",
    "bundle": "bundle",
    "new": "new",
    "load_model": "load_model",
    "check_strategy": "check_strategy",
    "Settings": "Settings",
    "load_settings": "load_settings",
    "DistillSettings": "DistillSettings",
    "load_distill_settings": "load_distill_settings",
    "SettingsError": "SettingsError",
}
"""What a notebook needs, each with its name in ``sim``."""

__all__ = [
    "DistillSettings",
    "Settings",
    "SettingsError",
    "bundle",
    "check_strategy",
    "cite",
    "compare",
    "cost",
    "data_overview",
    "distill",
    "doctor",
    "load_distill_settings",
    "load_model",
    "load_settings",
    "new",
    "ranks",
    "report",
    "run",
    "study_figures",
    "table",
    "watch",
]


def __getattr__(name: str) -> "Any":
    """Open what is offered from the floor above.

    Raises:
        ImportError: a package of another's that has the name of one of ours is loaded already.
    """
    if name not in OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    import_module("fedkd_start").pin()
    return getattr(import_module("sim"), OFFERED[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *OFFERED})
