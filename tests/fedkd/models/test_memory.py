"""What a model takes is known without making it, and without torch's compiler."""

import subprocess
import sys

import pytest
import torch

from fedkd.models import ModelSettings, build_model, describe_models
from fedkd.models.memory import weight_bytes

BUILT_IN = [model.name for model in describe_models()]
SHAPE = (3, 32, 32)


@pytest.mark.parametrize("name", BUILT_IN)
def test_bytes_are_those_of_the_model_that_is_made(name):
    model = ModelSettings(name=name)
    made = build_model(model, input_shape=SHAPE, num_classes=7, seed=0)
    tensors = [*made.parameters(), *made.buffers()]
    assert weight_bytes(model, SHAPE, 7) == sum(t.numel() * t.element_size() for t in tensors)


def test_a_model_may_draw_its_weights_by_hand():
    class Drawn(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.empty(5, 3).normal_(std=0.1))
            torch.nn.init.xavier_normal_(self.weight)

    from fedkd.models.memory import _bytes_of, _LeftBlank

    with torch.device("meta"), _LeftBlank():
        assert _bytes_of(Drawn()) == 60
    # Nowhere else is anything left blank.
    assert Drawn().weight.abs().sum() > 0


def test_measuring_leaves_the_compiler_of_torch_out():
    program = (
        "import sys\n"
        "from fedkd.models import ModelSettings\n"
        "from fedkd.models.memory import weight_bytes\n"
        f"for name in {BUILT_IN}:\n"
        f"    weight_bytes(ModelSettings(name=name), {SHAPE}, 7)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "False\n"
