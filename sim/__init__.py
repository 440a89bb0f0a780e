"""Running federations: settings, command line, engine, run folders, studies and reports."""

import os

# Nothing that we start reports to anybody; both are read when Flower and Ray are imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# On one machine Ray's own servers, which authenticate nobody, listen on the loopback only. The
# switch is named after the systems where that is Ray's default; "1" puts them on the network.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
# Workers without a GPU share choose the CPU themselves; Ray warns about hiding the GPUs for them.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
