"""Settings: what they are, how they are read, and what helps where they cannot work."""

from sim.settings.reading import (
    asked,
    check_code_of_data,
    load_distill_settings,
    load_settings,
    merge_tables,
    named,
    nested_table,
    read_file,
    read_over,
    read_settings,
    settings_from_table,
    strategy_fields,
)
from sim.settings.schema import (
    EngineSettings,
    Settings,
    SettingsError,
    check_seeds,
)

__all__ = [
    "EngineSettings",
    "Settings",
    "SettingsError",
    "asked",
    "check_code_of_data",
    "check_seeds",
    "load_distill_settings",
    "load_settings",
    "merge_tables",
    "named",
    "nested_table",
    "read_file",
    "read_over",
    "read_settings",
    "settings_from_table",
    "strategy_fields",
]
