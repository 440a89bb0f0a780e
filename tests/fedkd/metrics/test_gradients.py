import math

import pytest
import torch
from torch import nn

from fedkd.metrics import compare_gradients


@pytest.fixture(name="model")
def _model():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0]])
    return model


def test_norms_ratio_and_cosine_match_hand_computed_values(model):
    # Gradients (3, 4) and (0, 2): cosine 8 / (5 * 2).
    terms = {
        "ce": model(torch.tensor([[3.0, 4.0]])).sum(),
        "kd": model(torch.tensor([[0.0, 2.0]])).sum(),
    }
    comparison = compare_gradients(terms, "ce", "kd", model)
    assert comparison.first_norm == pytest.approx(5)
    assert comparison.second_norm == pytest.approx(2)
    assert comparison.norm_ratio == pytest.approx(0.4)
    assert comparison.cosine == pytest.approx(0.8)
    assert compare_gradients(terms, "kd", "ce", model).norm_ratio == pytest.approx(2.5)


def test_opposite_terms_are_in_conflict_and_a_term_is_like_itself(model):
    loss = model(torch.tensor([[3.0, 4.0]])).sum()
    assert compare_gradients({"a": loss, "b": -2 * loss}, "a", "b", model).cosine == -1
    assert compare_gradients({"a": loss}, "a", "a", model).cosine == 1


def test_training_goes_on_as_if_nothing_had_been_asked(model):
    terms = {"ce": (model(torch.ones(1, 2)) ** 2).sum(), "kd": model(torch.ones(1, 2)).sum()}
    compare_gradients(terms, "ce", "kd", model)
    assert model.weight.grad is None
    sum(terms.values()).backward()
    assert model.weight.grad.tolist() == [[5, 5]]


def test_a_term_that_does_not_reach_the_module_has_no_direction(model):
    other = nn.Linear(2, 1)
    terms = {"ce": model(torch.ones(1, 2)).sum(), "elsewhere": other(torch.ones(1, 2)).sum()}
    terms["off"] = torch.zeros(())
    for name in ("elsewhere", "off"):
        comparison = compare_gradients(terms, "ce", name, model)
        assert comparison.second_norm == 0
        assert comparison.norm_ratio == 0
        assert math.isnan(comparison.cosine)
        assert math.isnan(compare_gradients(terms, name, "ce", model).norm_ratio)


def test_only_the_trainable_parameters_of_the_module_count():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[1].requires_grad_(False)
    hidden = model[0](torch.tensor([[3.0, 4.0]]))
    terms = {"out": model[1](hidden).sum(), "hint": hidden[:, 0].sum()}
    whole = compare_gradients(terms, "out", "hint", model)
    assert whole == compare_gradients(terms, "out", "hint", model[0])
    assert whole.second_norm == pytest.approx(5)


def test_an_unknown_term_and_a_frozen_module_are_refused(model):
    terms = {"ce": model(torch.ones(1, 2)).sum(), "kd": model(torch.ones(1, 2)).sum()}
    with pytest.raises(ValueError, match="unknown loss term 'dk'; known: ce, kd"):
        compare_gradients(terms, "ce", "dk", model)
    with pytest.raises(ValueError, match="module must have a trainable parameter, got none"):
        compare_gradients(terms, "ce", "kd", nn.ReLU())
