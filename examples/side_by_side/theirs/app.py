"""The two halves of the federation, as Flower's apps."""

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import fit, load, make_model

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Digest the consensus, revisit private rows, answer with logits of the public rows."""
    settings = dict(message.content["settings"])
    me = int(context.node_config["partition-id"])
    torch.manual_seed(1000 * settings["seed"] + 100 * settings["round"] + me)
    data = load(settings)
    x, y = torch.from_numpy(data["x"]), torch.from_numpy(data["y"]).long()
    model = make_model(x.shape[1], int(y.max()) + 1, settings["seed"])
    if "model" in context.state:
        model.load_state_dict(context.state["model"].to_torch_state_dict())
    public = x[data["public"]]
    if "consensus" in message.content:
        target = torch.from_numpy(message.content["consensus"]["logits"].numpy())
        fit(model, public, target, settings, distil=True)
    own = data["parts"][me]
    fit(model, x[own], y[own], settings, distil=False)
    context.state["model"] = ArrayRecord(model.state_dict())
    with torch.no_grad():
        logits = model(public).numpy()
        hits = (model(x[data["test"]]).argmax(1) == y[data["test"]]).float().mean().item()
    content = RecordDict(
        {
            "logits": ArrayRecord({"logits": Array(logits)}),
            "metrics": MetricRecord({"accuracy": hits}),
        }
    )
    return Message(content, reply_to=message)


def mean(logits: np.ndarray) -> np.ndarray:
    """Return what FedMD's clients learn."""
    return logits.mean(0)


def surest(logits: np.ndarray) -> np.ndarray:
    """Return, for each row, the logits of the client whose best class leads by most."""
    first, second = np.sort(logits, axis=-1)[..., :-3:-1].transpose(2, 0, 1)
    return logits[(first - second).argmax(0), np.arange(logits.shape[1])]


def federate(grid, settings: dict, writer) -> list[float]:
    """Run the rounds; return the mean accuracy after each."""
    rule = {"mean": mean, "surest": surest}[settings["method"]]
    consensus, accuracies, sent = None, [], 0
    for number in range(1, settings["rounds"] + 1):
        content = {"settings": ConfigRecord({**settings, "round": number})}
        if consensus is not None:
            content["consensus"] = ArrayRecord({"logits": Array(consensus)})
        messages = [
            Message(RecordDict(content), dst_node_id=node, message_type="train")
            for node in sorted(grid.get_node_ids())
        ]
        replies = [reply for reply in grid.send_and_receive(messages) if reply.has_content()]
        answers = np.stack([reply.content["logits"]["logits"].numpy() for reply in replies])
        accuracies.append(
            float(np.mean([reply.content["metrics"]["accuracy"] for reply in replies]))
        )
        sent += answers.nbytes
        consensus = rule(answers)
        writer.add_scalar("accuracy", accuracies[-1], number)
        writer.add_scalar("bytes up", sent, number)
    return accuracies
