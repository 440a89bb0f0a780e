"""Several teachers, one target: who counts how much, and what is averaged."""

import pytest
import torch

from fedkd.distillation.task.combining import Combination, combined_target, teacher_shares
from fedkd.targets import (
    entropy_reduction,
    mean_logit,
    mean_probability,
    shares_by_confidence,
    shares_by_entropy,
    soften,
)

LOGITS = 2 * torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 3, 1, 2, 0])
RULES = ("uniform", "weights", "confidence", "entropy", "labels")
AVERAGES = ("probability", "logit", "era")


def combination(by="uniform", average="probability"):
    return Combination(by=by, average=average, weights=(1, 2, 5) if by == "weights" else ())


def target(logits, chosen, temperature=2.0):
    combined = combined_target(logits, chosen, temperature=temperature, labels=LABELS)
    return combined.probabilities(temperature)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("by", RULES)
def test_identical_teachers_are_one(by, average):
    three = LOGITS[:1].expand(3, -1, -1)
    one = combined_target(LOGITS[:1], Combination(average=average), temperature=2.0, labels=LABELS)
    expected = one.probabilities(2.0)
    assert target(three, combination(by, average)) == pytest.approx(expected, abs=1e-6)
    if average != "era":
        assert expected == pytest.approx(soften(LOGITS[0], temperature=2.0), abs=1e-6)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("by", RULES)
def test_the_order_of_teachers_classes_and_rows_means_nothing(by, average):
    chosen = combination(by, average)
    expected = target(LOGITS, chosen)
    swapped = chosen.model_copy(update={"weights": chosen.weights[::-1]})
    assert target(LOGITS.flip(0), swapped) == pytest.approx(expected, abs=1e-6)
    combined = combined_target(LOGITS.flip(1), chosen, temperature=2.0, labels=LABELS.flip(0))
    assert combined.probabilities(2.0).flip(0) == pytest.approx(expected, abs=1e-6)
    combined = combined_target(LOGITS.flip(2), chosen, temperature=2.0, labels=3 - LABELS)
    assert combined.probabilities(2.0).flip(1) == pytest.approx(expected, abs=1e-6)


def test_uniform_and_given_weights_match_the_plain_averages():
    for by, weights in (("uniform", None), ("weights", [1, 2, 5])):
        logit = combined_target(LOGITS, combination(by, "logit"), temperature=2.0)
        assert logit.logits() == pytest.approx(mean_logit(LOGITS, weights=weights), abs=1e-6)
        mean = mean_probability(LOGITS, temperature=2.0, weights=weights)
        assert target(LOGITS, combination(by)) == pytest.approx(mean, abs=1e-6)


def test_era_is_the_sharpened_mean_whatever_the_students_temperature():
    chosen = Combination(average="era", era_temperature=0.2)
    expected = entropy_reduction(mean_probability(LOGITS), temperature=0.2)
    for temperature in (1.0, 4.0):
        assert target(LOGITS, chosen, temperature) == pytest.approx(expected, abs=1e-6)


def test_confidence_shares_are_the_largest_probabilities():
    shares = teacher_shares(LOGITS, combination("confidence"))
    assert shares == pytest.approx(LOGITS.softmax(-1).amax(-1), abs=1e-6)


def test_entropy_and_label_shares_are_those_of_the_published_rule():
    by_entropy = teacher_shares(LOGITS, combination("entropy"))
    assert torch.equal(by_entropy, shares_by_entropy(LOGITS))
    by_label = teacher_shares(LOGITS, combination("labels"), LABELS)
    assert torch.equal(by_label, shares_by_confidence(LOGITS, LABELS))


def test_by_labels_a_teacher_that_is_right_moves_the_target():
    # One row: the first teacher is right, the second as sure and wrong.
    logits = torch.tensor([[[6.0, 0.0]], [[0.0, 6.0]]])
    chosen = Combination(by="labels")
    for label in (0, 1):
        combined = combined_target(logits, chosen, temperature=1.0, labels=torch.tensor([label]))
        assert combined.probabilities(1.0)[0, label] > 0.95


def test_a_sure_teacher_counts_more_row_by_row():
    # Each of two teachers is sure of one row.
    logits = torch.tensor([[[8.0, 0.0], [0.1, 0.0]], [[0.0, 0.1], [0.0, 8.0]]])
    for by in ("confidence", "entropy"):
        shares = teacher_shares(logits, Combination(by=by))
        assert shares[0, 0] > 1.5 * shares[1, 0]
        assert shares[1, 1] > 1.5 * shares[0, 1]


def test_no_gradient_reaches_a_teacher():
    logits = LOGITS.clone().requires_grad_()
    for by in RULES:
        for average in AVERAGES:
            combined = combined_target(
                logits, combination(by, average), temperature=2.0, labels=LABELS
            )
            assert not combined.tensor.requires_grad


def test_labels_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match=r"teacher.combine.by: labels needs .* use uniform"):
        combined_target(LOGITS, Combination(by="labels"), temperature=2.0)


def test_weights_must_be_one_a_teacher():
    with pytest.raises(ValueError, match=r"one number a model \(3\), got 2"):
        combined_target(LOGITS, Combination(by="weights", weights=(1, 2)), temperature=2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "weights"}, "weights belong to"),
        ({"weights": (1.0, 2.0)}, "weights belong to"),
        ({"by": "weights", "weights": (1.0, 0.0)}, "greater than or equal to"),
        ({"by": "weights", "weights": (1.0, float("inf"))}, "less than or equal to|finite number"),
        ({"era_temperature": 0.0}, "era_temperature"),
    ],
)
def test_weights_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Combination(**settings)
