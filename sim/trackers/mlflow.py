"""MLflow: a database in a local file; no server, and nothing of the machine or the user."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedkd.bounds import PathText, Text
from sim.trackers.base import Tracked, Tracker, TrackerRun

DATABASE = "mlflow.db"
ARTIFACTS = "mlflow-artifacts"

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
_MOST_PARAMS, _MOST_METRICS, _LONGEST = 100, 1000, 6000
"""That MLflow takes in one call, and of the text of one parameter."""


class MLflow(Tracker):
    """An experiment in a database that is a file."""

    needs: ClassVar[str] = "mlflow"

    kind: Literal["mlflow"] = "mlflow"
    folder: PathText | None = Field(
        None, description=f"holds {DATABASE} and files; none: the folder of all runs, output"
    )
    experiment: Text | None = Field(None, description="none: the name of the study or run")

    def open(self, run: Tracked) -> TrackerRun:
        """Begin a run in the experiment, or open it again."""
        # Read when MLflow is imported, which is here.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        os.environ["DO_NOT_TRACK"] = "true"
        # Its own notes on tables that it makes.
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        folder = Path(run.output if self.folder is None else self.folder).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=f"sqlite:///{folder / DATABASE}")
        if run.known_as is not None:
            try:
                client.update_run(run.known_as, status="RUNNING")
                return _Run(client, run.known_as)
            except MlflowException:
                # Another database, as after the folder was changed or removed.
                pass
        name = self.experiment or run.name
        known = client.get_experiment_by_name(name)
        if known is None:
            try:
                client.create_experiment(name, (folder / ARTIFACTS).as_uri())
            except MlflowException as error:
                # Another run of the study may have been first.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            known = client.get_experiment_by_name(name)
        if known is None:
            raise LookupError(f"MLflow has no experiment {name!r}, which was just made")
        experiment = known.experiment_id
        # Unlike `mlflow.start_run`, this records neither who runs it nor what git says.
        begun = client.create_run(experiment, run_name=run.title, tags={**run.labels, **self.tags})
        opened = _Run(client, begun.info.run_id)
        opened.params(run.settings)
        return opened


class _Run(TrackerRun):
    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self.known_as = run_id

    def params(self, settings: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, str(value)[:_LONGEST]) for name, value in settings.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            some = params[first : first + _MOST_PARAMS]
            self._client.log_batch(self.known_as, params=some)

    def log(self, round: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, round) for name, value in values.items()]
        for first in range(0, len(metrics), _MOST_METRICS):
            some = metrics[first : first + _MOST_METRICS]
            self._client.log_batch(self.known_as, metrics=some)

    def note(self, round: int, lines: Sequence[str]) -> None:
        text = "\n".join(lines) + "\n"
        self._client.log_text(self.known_as, text, f"events/round-{round:06d}.txt")

    def finish(self, status: str, result: Mapping[str, Any]) -> None:
        for key in ("status", "weights_sha256"):
            self._client.set_tag(self.known_as, key, str(result.get(key)))
        self._client.log_text(self.known_as, json.dumps(result, indent=1), "result.json")
        self._client.set_terminated(self.known_as, status=_STATUS[status])
