"""Which tensors a student takes from its teacher."""

import pytest
import torch
from torch import nn

from fedkd.compression import CopiedTensor, SkippedTensor, inherit
from fedkd.models import ModelSettings, build_model


def transformer(depth, seed, **options):
    settings = ModelSettings(
        name="transformer", options={"depth": depth, "dim": 8, "heads": 2, **options}
    )
    return build_model(settings, input_shape=(1, 8, 8), num_classes=3, seed=seed)


def test_equal_names_and_shapes_are_copied_and_equal():
    student, teacher = transformer(2, seed=0), transformer(4, seed=1)
    report = inherit(student, teacher)
    given = teacher.state_dict()
    assert [pair.student for pair in report.copied] == list(student.state_dict())
    assert report.skipped == ()
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, given[name]), name


def test_nothing_is_shared_and_the_teacher_stays_as_it_was():
    student, teacher = transformer(2, seed=0), transformer(2, seed=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    inherit(student, teacher)
    addresses = {tensor.data_ptr() for tensor in student.state_dict().values()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in teacher.state_dict().values())
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    student(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))).sum().backward()
    optimizer.step()
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_every_other_layer_as_distilbert_takes_them():
    student, teacher = transformer(2, seed=0), transformer(4, seed=1)
    report = inherit(student, teacher, {"": "", "blocks.0": "blocks.0", "blocks.1": "blocks.2"})
    assert CopiedTensor("blocks.1.mlp_in.weight", "blocks.2.mlp_in.weight") in report.copied
    assert torch.equal(student.blocks[1].mlp_in.weight, teacher.blocks[2].mlp_in.weight)
    assert not torch.equal(student.blocks[1].mlp_in.weight, teacher.blocks[1].mlp_in.weight)
    assert torch.equal(student.positions, teacher.positions)


def test_only_the_layers_named_are_copied():
    student, teacher = transformer(1, seed=0), transformer(2, seed=1)
    before = student.embedding.weight.clone()
    report = inherit(student, teacher, {"blocks.0": "blocks.1"})
    assert {pair.teacher.split(".")[1] for pair in report.copied} == {"1"}
    assert torch.equal(student.embedding.weight, before)
    assert SkippedTensor("embedding.weight", "no path of layers leads to it") in report.skipped
    assert len(report.copied) + len(report.skipped) == len(student.state_dict())


def test_a_path_is_whole_names_and_not_the_start_of_one():
    student = nn.ModuleDict({"block1": nn.Linear(2, 3), "block10": nn.Linear(2, 3)})
    teacher = nn.ModuleDict({"block1": nn.Linear(2, 3), "block10": nn.Linear(2, 3)})
    report = inherit(student, teacher, {"block1": "block10"})
    assert [pair.student for pair in report.copied] == ["block1.weight", "block1.bias"]
    assert torch.equal(student["block1"].weight, teacher["block10"].weight)


def test_what_does_not_fit_is_listed_with_the_reason_and_left_alone():
    student = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Linear(2, 2))
    teacher = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).double())
    teacher[1].running_mean += 4
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    report = inherit(student, teacher)
    assert [pair.student for pair in report.copied] == [
        "0.bias",
        *(
            f"1.{name}"
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        ),
    ]
    assert student[1].running_mean.tolist() == [4, 4, 4]
    reasons = dict(report.skipped)
    assert reasons["0.weight"] == "shape [3, 4], the teacher's is [3, 5]"
    assert reasons["2.bias"] == "type torch.float32, the teacher's is torch.float64"
    assert reasons["3.weight"] == "the teacher has no '3.weight'"
    for name in reasons:
        assert torch.equal(student.state_dict()[name], before[name]), name


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"blocks.7": "blocks.0"}, r"the student has no tensors under 'blocks\.7'; .*embedding"),
        ({"blocks.0": "layers.0"}, r"the teacher has no tensors under 'layers\.0'"),
    ],
)
def test_a_path_that_holds_nothing_is_an_error(layers, message):
    with pytest.raises(ValueError, match=message):
        inherit(transformer(1, seed=0), transformer(2, seed=1), layers)


def test_a_student_that_is_its_teacher_is_an_error():
    teacher = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="share 2 tensors"):
        inherit(teacher, teacher)
