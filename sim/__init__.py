"""Running federations: settings, command line, engine, run folders, studies and reports."""

import os

# Nothing that we start reports to anybody; both are read when Flower and Ray are imported.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
