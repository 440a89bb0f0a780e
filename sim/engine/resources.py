"""What this machine has for the engine; known without Ray, which takes a second to import."""

import os

import torch

from sim.settings import EngineSettings, SettingsError


def available_cpus() -> int:
    """Return the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_engine(engine: EngineSettings) -> None:
    """Refuse, before Ray starts, resources that this machine does not have.

    What a cluster has is known to the cluster only, so with ``engine.address`` Ray decides.

    Raises:
        SettingsError: names the setting and what there is.
    """
    if engine.address is not None:
        return
    cpus = available_cpus()
    if engine.on_ray and engine.cpus_per_worker > cpus:
        raise SettingsError(
            f"engine.cpus_per_worker must be at most the {cpus} CPUs of this machine, "
            f"got {engine.cpus_per_worker:g}"
        )
    gpus = torch.cuda.device_count()
    if engine.gpus_per_worker > gpus:
        raise SettingsError(
            f"engine.gpus_per_worker must be at most the {gpus} GPUs that PyTorch sees here, "
            f"got {engine.gpus_per_worker:g}"
        )
    if engine.gpus_per_worker and not engine.on_ray:
        raise SettingsError(
            f"engine.gpus_per_worker needs engine.backend: ray, got {engine.gpus_per_worker:g} "
            "with inline"
        )
