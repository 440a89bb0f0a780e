"""One run; with --multirun a sweep."""

import json
import time
from pathlib import Path

import hydra
from app import client_app, federate
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf
from torch.utils.tensorboard import SummaryWriter


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Federate, and leave the curve beside TensorBoard's file."""
    settings = OmegaConf.to_container(config, resolve=True)
    settings["data"] = to_absolute_path(settings["data"])
    server_app = ServerApp()
    result = {}

    @server_app.main()
    def serve(grid, _context) -> None:
        while len(list(grid.get_node_ids())) < settings["clients"]:
            time.sleep(0.1)
        with SummaryWriter(".") as writer:
            result["accuracies"] = federate(grid, settings, writer)

    run_simulation(server_app, client_app, num_supernodes=settings["clients"])
    Path("result.json").write_text(json.dumps({**settings, **result}), encoding="utf-8")


if __name__ == "__main__":
    main()
