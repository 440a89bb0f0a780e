"""Values and gradients of the losses that torchdistill has too.

Its loss modules need nothing but torch, so ``pip install --no-deps torchdistill`` is enough; its
other parts want torchvision, which does not load next to a torch without CUDA.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses import correlation, relation, response, standardised
from fedkd.losses.feature import attention_transfer

theirs = pytest.importorskip("torchdistill.losses.mid_level")

LABELS = torch.tensor([2, 0, 1, 1, 3])


def random(*shape: int, seed: int, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def tapped(output: Tensor, **supplement: Tensor) -> dict[str, Any]:
    """What torchdistill's hooks hand to a loss."""
    return {"layer": {"input": output, "output": output}, "empty": {"input": supplement}}


def value_and_gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    return value.detach(), grad


def agree(
    ours: Callable[[Tensor], Tensor], their_module: Any, student: Tensor, teacher: Tensor
) -> None:
    value, grad = value_and_gradient(ours, student)
    expected, expected_grad = value_and_gradient(
        lambda s: their_module(tapped(s), tapped(teacher), LABELS), student
    )
    assert value.item() > 1e-6
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-10)


ENDS = ("layer", "output", "layer", "output")


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_with_labels(temperature: float):
    student, teacher = random(5, 4, seed=1), random(5, 4, seed=2)

    def ours(logits: Tensor) -> Tensor:
        kd = response.soft_target_loss(logits, teacher, temperature=temperature)
        return 0.3 * F.cross_entropy(logits, LABELS) + 0.7 * kd

    agree(ours, theirs.KDLoss(*ENDS, temperature, alpha=0.3), student, teacher)


@pytest.mark.parametrize(
    ("beta", "gamma", "temperature"), [(1.0, 1.0, 1.0), (2.0, 0.5, 4.0), (1.0, 0.0, 2.0)]
)
def test_dist(beta: float, gamma: float, temperature: float):
    student, teacher = random(5, 4, seed=1), random(5, 4, seed=2)
    weights = {"beta": beta, "gamma": gamma}
    agree(
        lambda s: correlation.dist_loss(s, teacher, temperature=temperature, **weights),
        theirs.DISTLoss(*ENDS, beta, gamma, temperature),
        student,
        teacher,
    )


def test_logit_standardisation():
    student, teacher = random(5, 4, seed=1), random(5, 4, seed=2)

    def ours(logits: Tensor) -> Tensor:
        kd = standardised.standardised_kd(logits, teacher, temperature=2.0)
        return 0.1 * F.cross_entropy(logits, LABELS) + 9 * kd

    agree(ours, theirs.LogitStdKDLoss(*ENDS, 2.0, alpha=0.1, beta=9), student, teacher)


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_attention_transfer(mode: str):
    student, teacher = random(5, 3, 6, 2, seed=1), random(5, 4, 6, 2, seed=2)
    end = {"io": "output", "path": "layer"}
    module = theirs.ATLoss({"pair": {"student": end, "teacher": end}}, mode=mode)
    agree(lambda s: attention_transfer(s, teacher, mode=mode), module, student, teacher)


@pytest.mark.parametrize(("distance", "angle"), [(1.0, 0.0), (0.0, 1.0), (25.0, 50.0)])
def test_relational_distances_and_angles(distance: float, angle: float):
    student, teacher = random(5, 3, seed=1), random(5, 7, seed=2)

    def ours(embedding: Tensor) -> Tensor:
        distances = relation.rkd_distance_loss(embedding, teacher)
        return distance * distances + angle * relation.rkd_angle_loss(embedding, teacher)

    agree(ours, theirs.RKDLoss("layer", "layer", distance, angle, "mean"), student, teacher)


def test_similarity_preserving(monkeypatch: pytest.MonkeyPatch):
    student, teacher = random(5, 3, seed=1), random(5, 7, seed=2)
    # They write normalize(z, 1), whose 1 is the order of the norm; the paper's rows have L2 norm 1.
    monkeypatch.setattr(theirs, "normalize", lambda z, _: F.normalize(z, p=2.0, dim=1))
    agree(
        lambda s: relation.similarity_preserving_loss(s, teacher),
        theirs.SPKDLoss("layer", "layer", "batchmean"),
        student,
        teacher,
    )


def test_probabilistic_knowledge_transfer():
    student, teacher = random(5, 3, seed=1), random(5, 7, seed=2)
    value, grad = value_and_gradient(lambda s: relation.pkt_loss(s, teacher), student)
    # Their module overwrites NaN in place in what it is given, and adds 1e-7 to each length.
    expected, expected_grad = value_and_gradient(
        lambda s: theirs.PKTLoss(*ENDS)(tapped(s * 1), tapped(teacher.clone())), student
    )
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-9)


def test_contrastive_representation():
    # Eight rows in the bank: their sampler's set-up fails where 1/rows is not exact.
    num_rows, temperature = 8, 0.5
    row_ids = torch.tensor([6, 0, 3, 5, 2])
    negative_ids = torch.tensor([[1, 2, 7], [3, 4, 1], [0, 1, 2], [7, 6, 0], [4, 3, 6]])
    student, teacher, student_bank, teacher_bank = (
        F.normalize(random(rows, 4, seed=seed), dim=1)
        for seed, rows in enumerate([5, 5, num_rows, num_rows])
    )
    module = theirs.CRDLoss(
        "layer", "empty", "layer", 4, num_rows, 3, num_rows, temperature=temperature, eps=0.0
    ).double()

    def their_loss(embedding: Tensor) -> Tensor:
        module.memory_v1.copy_(student_bank)
        module.memory_v2.copy_(teacher_bank)
        candidates = torch.cat([row_ids[:, None], negative_ids], dim=1)
        seen = tapped(embedding, pos_idx=row_ids, contrast_idx=candidates)
        return module(seen, tapped(teacher)).squeeze()

    their_loss(student)  # their first batch settles both normalisers
    student_normaliser, teacher_normaliser = module.params[2], module.params[3]

    def our_loss(embedding: Tensor) -> Tensor:
        return relation.contrastive_representation_loss(
            embedding,
            teacher,
            student_bank,
            teacher_bank,
            row_ids=row_ids,
            negative_ids=negative_ids,
            student_log_normaliser=student_normaliser.log(),
            teacher_log_normaliser=teacher_normaliser.log(),
            temperature=temperature,
        )

    value, grad = value_and_gradient(our_loss, student)
    expected, expected_grad = value_and_gradient(their_loss, student)
    torch.testing.assert_close(value, expected, rtol=1e-8, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-10)
