"""Weights & Biases, offline: files that `wandb sync` can send, if somebody wants that."""

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedkd.bounds import PathText, Text
from sim.trackers.base import Tracked, Tracker, TrackerRun


class WandB(Tracker):
    """Runs of a project, grouped by the arms of a study."""

    needs: ClassVar[str] = "wandb"

    kind: Literal["wandb"] = "wandb"
    folder: PathText | None = Field(
        None, description="where wandb/ is made; none: in each run's folder"
    )
    project: Text | None = Field(None, description="none: the name of the study or run")
    mode: Literal["offline", "online"] = Field(
        "offline", description="offline: only files; online: sent to the account that wandb has"
    )

    def open(self, run: Tracked) -> TrackerRun:
        """Begin a run, or go on under its id; offline each process has files of its own."""
        # Of its own errors it would tell its makers; read when it is imported, which is here.
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        known_as = run.known_as or secrets.token_hex(4)
        tags = [f"{name}: {text}" for name, text in self.tags.items()]
        begun = wandb.init(
            mode=self.mode,
            dir=str(run.folder if self.folder is None else self.folder),
            project=self.project or run.name,
            id=known_as,
            resume="allow" if run.known_as is not None else None,
            name=run.title,
            group=run.arm or None,
            tags=tags,
            config={**run.settings, "fedkd": run.labels},
            reinit="create_new",
            # Nothing of the machine, the user, git, the command or what is printed.
            settings=wandb.Settings(
                console="off",
                host="localhost",
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                disable_job_creation=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_disable_machine_info=True,
                x_save_requirements=False,
            ),
        )
        begun.define_metric("*", step_metric="round")
        return _Run(begun, known_as)


class _Run(TrackerRun):
    def __init__(self, run: Any, known_as: str) -> None:
        self._run = run
        self.known_as = known_as

    def log(self, round: int, values: Mapping[str, float]) -> None:
        self._run.log({"round": round, **values})

    def note(self, round: int, lines: Sequence[str]) -> None:
        self._run.log({"round": round, "events": "\n".join(lines)})

    def finish(self, status: str, result: Mapping[str, Any]) -> None:
        for key in ("status", "weights_sha256", "rounds", "seconds"):
            self._run.summary[key] = result.get(key)
        self._run.finish(exit_code=0 if status == "finished" else 1)
