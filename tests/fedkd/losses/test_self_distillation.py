"""Self-distillation: branches that learn from the deepest, views that a teacher relates."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedkd.losses.self_distillation import (
    SelfSupervisedLosses,
    be_your_own_teacher_losses,
    contrastive_view_loss,
    error_level_mask,
    rotated_views,
    self_supervised_losses,
    view_similarities,
)


def draw(*shape: int, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(*shape, generator=source, dtype=torch.float64)


BRANCHES, FEATURES = draw(3, 5, 4, seed=1), draw(3, 5, 6, seed=2)
LABELS = torch.tensor([0, 3, 1, 2, 3])


def total(logits: Tensor, **settings: object) -> Tensor:
    return be_your_own_teacher_losses(logits, LABELS, **settings).sum()  # type: ignore[arg-type]


# --- branches -------------------------------------------------------------------------------


def test_branches_match_the_published_sum():
    losses = be_your_own_teacher_losses(
        BRANCHES, LABELS, features=FEATURES, feature_weight=0.03, temperature=3.0
    )
    soft = torch.softmax(BRANCHES[2] / 3, 1)
    for branch in (0, 1):
        imitation = -(soft * torch.log_softmax(BRANCHES[branch] / 3, 1)).sum(1).mean()
        distance = ((FEATURES[branch] - FEATURES[2]) ** 2).sum(1).mean()
        expected = 0.7 * F.cross_entropy(BRANCHES[branch], LABELS) + 0.3 * imitation
        torch.testing.assert_close(losses[branch], expected + 0.03 * distance)
    torch.testing.assert_close(losses[2], F.cross_entropy(BRANCHES[2], LABELS))


def test_a_branch_that_knows_nothing_pays_the_logarithm_of_the_classes():
    losses = be_your_own_teacher_losses(torch.zeros(2, 5, 4, dtype=torch.float64), LABELS)
    assert losses.tolist() == pytest.approx([math.log(4)] * 2, rel=1e-12)


def test_the_square_of_the_temperature_is_off_by_default():
    bare = be_your_own_teacher_losses(BRANCHES, LABELS, ce_weight=0.0, temperature=3.0)
    scaled = be_your_own_teacher_losses(
        BRANCHES, LABELS, ce_weight=0.0, temperature=3.0, scale_by_t2=True
    )
    torch.testing.assert_close(scaled[:2], 9 * bare[:2])
    torch.testing.assert_close(scaled[2], bare[2])


def test_the_deepest_branch_learns_from_the_labels_alone():
    logits, features = BRANCHES.clone().requires_grad_(), FEATURES.clone().requires_grad_()
    total(logits, features=features, feature_weight=0.5).backward()
    alone = BRANCHES[2].clone().requires_grad_()
    F.cross_entropy(alone, LABELS).backward()
    assert logits.grad is not None
    assert features.grad is not None
    torch.testing.assert_close(logits.grad[2], alone.grad)
    assert torch.equal(features.grad[2], torch.zeros_like(features.grad[2]))
    assert features.grad[:2].norm() > 0.1


def test_a_network_with_one_branch_trains_as_without():
    losses = be_your_own_teacher_losses(BRANCHES[:1], LABELS)
    torch.testing.assert_close(losses[0], F.cross_entropy(BRANCHES[0], LABELS))


def test_branches_without_weights_do_not_learn():
    leaf = BRANCHES.clone().requires_grad_()
    total(leaf, ce_weight=0.0, kd_weight=0.0).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[:2], torch.zeros_like(leaf.grad[:2]))


def test_a_mask_divides_by_the_rows_it_keeps_in_every_branch():
    mask = torch.tensor([1.0, 0, 0, 1, 0], dtype=torch.float64)
    kept = mask.bool()
    torch.testing.assert_close(
        be_your_own_teacher_losses(
            BRANCHES, LABELS, features=FEATURES, feature_weight=1.0, sample_weights=mask
        ),
        be_your_own_teacher_losses(
            BRANCHES[:, kept], LABELS[kept], features=FEATURES[:, kept], feature_weight=1.0
        ),
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ce_weight": -0.1}, "ce_weight must be >= 0 and finite, got -0.1"),
        ({"kd_weight": math.nan}, "kd_weight must be >= 0 and finite, got nan"),
        ({"feature_weight": math.inf}, "feature_weight must be >= 0 and finite, got inf"),
        ({"feature_weight": 0.1}, "feature_weight 0.1 needs features"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
    ],
)
def test_branches_refuse_settings_out_of_range(settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        total(BRANCHES, **settings)


# --- views ----------------------------------------------------------------------------------


def test_four_turns_of_a_square_image():
    image = torch.tensor([[1, 2], [3, 4]])[None, None]
    turned = [view[0, 0].tolist() for view in rotated_views(image)]
    assert turned == [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]


def test_views_keep_rows_and_channels_apart():
    images = draw(2, 3, 5, 5, seed=1)
    views = rotated_views(images)
    assert views.shape == (4, 2, 3, 5, 5)
    assert torch.equal(views[0], images)
    assert torch.equal(rotated_views(views[1])[3], images)
    assert torch.equal(views[:, 1, 2], rotated_views(images[1:, 2:])[:, 0, 0])


def test_views_refuse_images_that_are_not_square():
    with pytest.raises(ValueError, match=r"^rotated views need square images, got 4 x 5"):
        rotated_views(torch.zeros(1, 1, 4, 5))


def test_similarities_compare_transformed_rows_with_normal_ones():
    embeddings = draw(3, 5, 6, seed=1)
    similarities = view_similarities(embeddings)
    assert similarities.shape == (10, 5)
    for view, row, other in ((1, 0, 3), (2, 4, 1), (2, 2, 2)):
        expected = F.cosine_similarity(embeddings[view, row], embeddings[0, other], dim=0)
        torch.testing.assert_close(similarities[(view - 1) * 5 + row, other], expected)


def test_similarities_of_a_zero_vector_are_zero_without_a_gradient():
    leaf = torch.zeros(2, 3, 4, requires_grad=True)
    similarities = view_similarities(leaf)
    similarities.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(similarities, torch.zeros(3, 3))
    assert torch.equal(leaf.grad, torch.zeros(2, 3, 4))


def test_contrast_of_views_matches_a_value_worked_out_by_hand():
    # Orthogonal rows whose views agree: cosine 1 with the own row, 0 with the other, over 1/2.
    embeddings = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    by_hand = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert contrastive_view_loss(embeddings, temperature=0.5).item() == pytest.approx(by_hand)


def test_contrast_of_views_gradient_agrees_with_finite_differences():
    leaf = draw(3, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(contrastive_view_loss, (leaf,))


# --- which rows a teacher may teach ----------------------------------------------------------

# Error levels against class 0: 0, 1, 2, 3, 1.
SCORES = torch.tensor(
    [[9.0, 1, 2, 3], [2, 9, 1, 0], [2, 9, 3, 0], [0, 1, 2, 3], [2, 3, 1, 0]], dtype=torch.float64
)
ZEROS = torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize(
    ("share", "kept"),
    [
        (0.0, [1, 0, 0, 0, 0]),
        # Rows 1 and 4 are of one level; row 4 gives the target the greater probability.
        (0.25, [1, 0, 0, 0, 1]),
        (0.5, [1, 1, 0, 0, 1]),
        (0.75, [1, 1, 1, 0, 1]),
        (0.99, [1, 1, 1, 0, 1]),
        (1.0, [1, 1, 1, 1, 1]),
    ],
)
def test_the_mask_keeps_the_right_rows_and_the_least_wrong(share: float, kept: list[int]):
    assert error_level_mask(SCORES, ZEROS, wrong_share=share).tolist() == kept


def test_the_mask_does_not_depend_on_the_order_of_rows():
    order = torch.tensor([4, 2, 0, 3, 1])
    for share in (0.25, 0.5, 0.75):
        mask = error_level_mask(SCORES, ZEROS, wrong_share=share)
        assert torch.equal(error_level_mask(SCORES[order], ZEROS, wrong_share=share), mask[order])


def test_the_mask_of_a_stack_is_the_stack_of_masks():
    scores = draw(2, 7, 3, seed=1)
    targets = torch.tensor([0, 1, 2, 0, 1, 2, 0])

    def mask(rows: Tensor) -> Tensor:
        return error_level_mask(rows, targets, wrong_share=0.5)

    assert torch.equal(torch.func.vmap(mask)(scores), torch.stack([mask(rows) for rows in scores]))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_the_mask_refuses_a_share_out_of_range(share: float):
    with pytest.raises(ValueError, match=r"^wrong_share must be in \[0, 1\], got"):
        error_level_mask(SCORES, ZEROS, wrong_share=share)


# --- self-supervised distillation -------------------------------------------------------------

STUDENT, TEACHER = draw(4, 5, 3, seed=3), draw(4, 5, 3, seed=4)
STUDENT_HEAD, TEACHER_HEAD = draw(4, 5, 6, seed=5), draw(4, 5, 7, seed=6)
CLASSES = torch.tensor([0, 2, 1, 2, 0])


def parts(
    student: Tensor = STUDENT,
    teacher: Tensor = TEACHER,
    student_head: Tensor = STUDENT_HEAD,
    teacher_head: Tensor = TEACHER_HEAD,
    **settings: float,
) -> SelfSupervisedLosses:
    return self_supervised_losses(student, teacher, student_head, teacher_head, CLASSES, **settings)


def kl(target: Tensor, scores: Tensor, temperature: float) -> Tensor:
    target_log_p = torch.log_softmax(target / temperature, 1)
    log_p = torch.log_softmax(scores / temperature, 1)
    return (target_log_p.exp() * (target_log_p - log_p)).sum(1)


def test_parts_match_a_loop_over_rows():
    def similarities(head: Tensor) -> Tensor:
        return torch.stack(
            [
                torch.stack([F.cosine_similarity(head[v, b], head[0, c], dim=0) for c in range(5)])
                for v in (1, 2, 3)
                for b in range(5)
            ]
        )

    def kept(scores: Tensor, targets: list[int], share: float) -> list[int]:
        levels = {
            row: (scores[row] > scores[row, target]).sum().item()
            - torch.softmax(scores[row], 0)[target].item()
            for row, target in enumerate(targets)
        }
        wrong = sorted((row for row in levels if levels[row] > 0), key=levels.__getitem__)
        right = [row for row in levels if levels[row] <= 0]
        return right + wrong[: int(share * len(wrong))]

    found = parts(ss_wrong_share=0.75, tf_wrong_share=0.5)
    torch.testing.assert_close(found.ce, F.cross_entropy(STUDENT[0], CLASSES))
    torch.testing.assert_close(found.kd, 16 * kl(TEACHER[0], STUDENT[0], 4).mean())
    teacher_similarities = similarities(TEACHER_HEAD)
    rows = kept(teacher_similarities, list(range(5)) * 3, 0.75)
    assert 0 < len(rows) < 15
    per_row = kl(teacher_similarities, similarities(STUDENT_HEAD), 0.5)
    torch.testing.assert_close(found.ss, 0.25 * per_row[rows].mean())
    teacher_rows, student_rows = TEACHER[1:].reshape(15, 3), STUDENT[1:].reshape(15, 3)
    rows = kept(teacher_rows, CLASSES.tolist() * 3, 0.5)
    assert 0 < len(rows) < 15
    torch.testing.assert_close(found.tf, 16 * kl(teacher_rows, student_rows, 4)[rows].mean())


def test_the_total_takes_the_published_weights():
    one = torch.tensor(1.0)
    assert SelfSupervisedLosses(one, 0 * one, 0 * one, 0 * one).total().item() == 1.0
    assert SelfSupervisedLosses(0 * one, one, 0 * one, 0 * one).total().item() == pytest.approx(0.9)
    assert SelfSupervisedLosses(0 * one, 0 * one, one, 0 * one).total().item() == 10.0
    assert SelfSupervisedLosses(0 * one, 0 * one, 0 * one, one).total().item() == pytest.approx(2.7)


def test_a_student_that_agrees_pays_only_for_the_labels():
    found = parts(student=TEACHER, student_head=TEACHER_HEAD)
    for part in (found.kd, found.ss, found.tf):
        assert part.item() == pytest.approx(0.0, abs=1e-14)


def test_every_part_reaches_the_student_and_none_the_teacher():
    leaves = [
        tensor.clone().requires_grad_() for tensor in (STUDENT, TEACHER, STUDENT_HEAD, TEACHER_HEAD)
    ]
    found = parts(*leaves)
    for part, side in ((found.ce, 0), (found.kd, 0), (found.ss, 2), (found.tf, 0)):
        gradients = torch.autograd.grad(part, leaves, retain_graph=True, allow_unused=True)
        reached = [gradient is not None and gradient.norm().item() > 1e-4 for gradient in gradients]
        assert reached == [index == side for index in range(4)]


def test_no_transformed_row_counts_where_the_teacher_is_always_wrong():
    wrong = torch.full((4, 5, 3), 5.0, dtype=torch.float64)
    wrong.scatter_(2, CLASSES.repeat(4, 1)[..., None], -5.0)
    found = parts(teacher=wrong, tf_wrong_share=0.0)
    assert found.tf.item() == 0.0
    assert parts(teacher=wrong, tf_wrong_share=1.0).tf.item() > 0.1


SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "branches": lambda logits: be_your_own_teacher_losses(
        torch.cat([logits[:2], TEACHER[:1]]), CLASSES
    ).sum(),
    "self_supervised": lambda logits: parts(student=logits).total(),
}
every_loss = pytest.mark.parametrize("loss", SCALARS.values(), ids=SCALARS.keys())


@every_loss
def test_gradient_agrees_with_finite_differences(loss: Callable[[Tensor], Tensor]):
    assert torch.autograd.gradcheck(loss, (STUDENT.clone().requires_grad_(),))


def test_gradient_of_the_similarities_agrees_with_finite_differences():
    leaf = STUDENT_HEAD.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda head: parts(student_head=head).ss, (leaf,))


@every_loss
def test_a_constant_added_to_a_row_changes_nothing(loss: Callable[[Tensor], Tensor]):
    torch.testing.assert_close(loss(STUDENT + draw(4, 5, 1, seed=9)), loss(STUDENT))


@every_loss
def test_a_stack_of_students_gives_what_each_gives(loss: Callable[[Tensor], Tensor]):
    students = draw(2, 4, 5, 3, seed=8)
    torch.testing.assert_close(
        torch.func.vmap(loss)(students), torch.stack([loss(student) for student in students])
    )


def test_reordering_rows_or_renaming_classes_together_changes_nothing():
    rows, classes = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 0, 1])
    renamed = classes.argsort()[CLASSES]
    expected = parts()
    shuffled = self_supervised_losses(
        STUDENT[:, rows][..., classes],
        TEACHER[:, rows][..., classes],
        STUDENT_HEAD[:, rows],
        TEACHER_HEAD[:, rows],
        renamed[rows],
    )
    for part, other in zip(expected, shuffled, strict=True):
        torch.testing.assert_close(part, other)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_losses(half: torch.dtype):
    tensors = [tensor.to(half) for tensor in (STUDENT, TEACHER, STUDENT_HEAD, TEACHER_HEAD)]
    found, exact = parts(*tensors), parts(*[tensor.double() for tensor in tensors])
    for part, expected in zip(found, exact, strict=True):
        assert part.dtype == torch.float32
        assert part.item() == pytest.approx(expected.item(), rel=1e-4)
    branches = be_your_own_teacher_losses(
        BRANCHES.to(half), LABELS, features=FEATURES.to(half), feature_weight=1.0
    )
    assert branches.dtype == torch.float32


def test_autocast_does_not_coarsen_the_similarities():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = view_similarities(STUDENT_HEAD.float())
    torch.testing.assert_close(coarse, view_similarities(STUDENT_HEAD).float())


def test_self_supervision_refuses_a_single_view_and_a_cold_temperature():
    with pytest.raises(ValueError, match=r"^self-supervision needs at least 2 views, got 1"):
        parts(STUDENT[:1], TEACHER[:1], STUDENT_HEAD[:1], TEACHER_HEAD[:1])
    for name in ("kd_temperature", "ss_temperature", "tf_temperature"):
        with pytest.raises(ValueError, match=rf"^{name} must be > 0, got 0.0"):
            parts(**{name: 0.0})


def test_an_empty_batch_costs_nothing():
    found = self_supervised_losses(
        torch.zeros(4, 0, 3),
        torch.zeros(4, 0, 3),
        torch.zeros(4, 0, 6),
        torch.zeros(4, 0, 6),
        torch.zeros(0, dtype=torch.long),
    )
    assert found.total().item() == 0.0
    none = torch.zeros(0, dtype=torch.long)
    assert be_your_own_teacher_losses(torch.zeros(2, 0, 3), none).tolist() == [0.0, 0.0]
    assert contrastive_view_loss(torch.zeros(4, 0, 3)).item() == 0.0
