"""Targets that know their scale: soft labels are never softened twice, nor taken for logits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.targets import Targets, soften
from fedkd.training import PublicLesson

LOGITS = 2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


def test_soft_labels_are_handed_out_bit_for_bit_at_their_own_temperature():
    soft = soften(LOGITS, temperature=2.5)
    targets = Targets(soft, scale="probabilities", temperature=2.5)
    assert torch.equal(targets.probabilities(2.5), soft)


def test_a_sure_soft_label_stays_sure():
    # Softened once more with temperature 1, 0.991 of ten classes would be 0.230.
    sure = torch.full((4, 10), 0.001).index_fill(1, torch.tensor([3]), 0.991)
    targets = Targets(sure, scale="probabilities")
    assert targets.probabilities(1.0)[0, 3].item() == pytest.approx(0.991, rel=1e-6)
    assert torch.softmax(sure, -1)[0, 3].item() == pytest.approx(0.230, abs=5e-4)


@settings(deadline=None, max_examples=25)
@given(made=st.floats(0.5, 8), asked=st.floats(0.5, 8))
def test_soft_labels_of_one_temperature_become_those_of_another(made, asked):
    # (9/10, 1/10) at temperature 1 is softmax(ln 9, 0); at 2 it is (3/4, 1/4).
    by_hand = Targets(torch.tensor([[0.9, 0.1]]), "probabilities").probabilities(2.0)
    assert by_hand[0].tolist() == pytest.approx([0.75, 0.25], rel=1e-6)
    targets = Targets(soften(LOGITS, temperature=made), "probabilities", made)
    torch.testing.assert_close(
        targets.probabilities(asked), soften(LOGITS, temperature=asked), atol=2e-5, rtol=1e-3
    )


def test_logits_are_softened_by_whoever_asks():
    targets = Targets(LOGITS)
    assert torch.equal(targets.logits(), LOGITS)
    assert torch.equal(targets.probabilities(3.0), soften(LOGITS, temperature=3.0))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_of_soft_labels_soften_to_them_and_are_finite(temperature):
    soft = soften(LOGITS, temperature=temperature)
    logits = Targets(soft, "probabilities", temperature).logits()
    torch.testing.assert_close(torch.softmax(logits / temperature, -1), soft)
    ruled_out = Targets(torch.tensor([[1.0, 0.0]]), "probabilities", temperature).logits()
    assert torch.isfinite(ruled_out).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(5, 3), (4, 10), (2, 3, 3)])
def test_soft_labels_in_the_place_of_logits_are_refused_with_the_fix(dtype, shape):
    values = soften(torch.randn(shape), temperature=2.0).numpy().astype(dtype)
    with pytest.raises(ValueError, match="hand them in with scale='probabilities'"):
        Targets(values)
    Targets(values, scale="probabilities")


def test_logits_are_not_taken_for_soft_labels_by_chance():
    Targets(torch.tensor([[0.5, 0.5], [0.2, 0.8], [1.0, 0.0]]))  # three rows may be logits
    Targets(torch.ones(8, 1))  # one class has nothing but 1
    almost = soften(torch.randn(8, 3), temperature=1.0)
    almost[7, 0] += 0.1
    Targets(almost)
    Targets(torch.full((8, 3), float("nan")))


def test_logits_in_the_place_of_soft_labels_are_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got .*scale='logits'"):
        Targets(LOGITS, scale="probabilities")
    # Rows that nobody speaks about are 0, and rounding is forgiven.
    Targets(torch.tensor([[0.0, 0.0], [1.0005, -0.0005]]), scale="probabilities")


def test_what_has_no_say_or_no_meaning_is_refused():
    with pytest.raises(ValueError, match=r"temperature=4\.0 has no say beside scale='logits'"):
        Targets(LOGITS, temperature=4.0)
    # Called by itself: in tests the types of arguments are checked before anything runs.
    with pytest.raises(ValueError, match="scale must be logits or probabilities, got 'softmax'"):
        Targets.__post_init__(SimpleNamespace(values=LOGITS, scale="softmax"))
    with pytest.raises(ValueError, match=r"must be \[rows, classes\], got shape \[3\]"):
        Targets(torch.zeros(3))
    with pytest.raises(ValueError, match="temperature must be > 0"):
        Targets(LOGITS).probabilities(0.0)


def test_targets_are_constants():
    logits = LOGITS.clone().requires_grad_()
    assert not Targets(logits).logits().requires_grad
    assert not Targets(logits).probabilities(2.0).requires_grad
    assert not Targets(soften(logits, temperature=2.0), "probabilities", 2.0).logits().requires_grad


def test_arrays_in_shared_memory_are_read_and_never_written():
    values = LOGITS.numpy().copy()
    values.flags.writeable = False
    before = values.copy()
    Targets(values).probabilities(2.0)
    assert np.array_equal(values, before)


def test_a_lesson_of_bare_numbers_is_refused_with_the_fix():
    # Called by itself: in tests the types of arguments are checked before anything runs.
    with pytest.raises(TypeError, match=r"must be Targets, got ndarray: write Targets\(values"):
        PublicLesson.__post_init__(SimpleNamespace(targets=LOGITS.numpy()))
