"""What an objective returns, and the mean over the rows that count."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.losses.reduction import PerRow, StepRows, WholeStep

BOTH = StepRows({"private": 3, "public": 2})
ONE = StepRows({"private": 3})


def test_the_mean_is_over_the_rows_that_count():
    # (1 + 2) / 2; what the padding holds does not matter.
    values = torch.tensor([1.0, 2.0, 99.0])
    counted = torch.tensor([1.0, 1.0, 0.0])
    step = StepRows({"private": 3}, {"private": counted})
    assert step.mean("ce", PerRow(values)).item() == 1.5
    assert ONE.mean("ce", PerRow(values)).item() == 34.0


def test_weights_divide_by_their_sum_and_factors_multiply_the_mean():
    # (3 * 1 + 1 * 5) / 4 = 2, times 0.5 times 4.
    weights = torch.tensor([3.0, 1.0, 0.0])
    loss = 4.0 * (0.5 * PerRow(torch.tensor([1.0, 5.0, 7.0]), weights=weights))
    assert loss.mean().item() == 4.0
    assert (1 * loss) is loss
    assert loss.row_losses().tolist() == [6.0, 10.0, 0.0]
    nobody = PerRow(torch.ones(3), weights=torch.zeros(3)).mean()
    assert nobody.item() == 0.0


def test_half_of_a_loss_of_the_whole_step():
    assert (0.5 * WholeStep(torch.tensor(3.0))).value.item() == 1.5
    assert BOTH.mean("rkd", WholeStep(torch.tensor(3.0)) * 2).item() == 6.0


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6),
    padding=st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e30]), max_size=5),
    weighted=st.booleans(),
    factor=st.sampled_from([1.0, 0.25, 3.0]),
)
def test_padding_of_any_kind_changes_no_value_and_no_gradient(values, padding, weighted, factor):
    def judged(numbers, counted):
        rows = torch.tensor(numbers, requires_grad=True)
        # As an author writes it: the padded rows' weights are garbage as well.
        weights = rows.detach().abs() + 1 if weighted else None
        loss = factor * PerRow(rows.square(), weights=weights)
        mean = loss.mean(counted)
        mean.backward()
        return mean.item(), rows.grad[: len(values)], rows.grad[len(values) :]

    counted = torch.tensor([1.0] * len(values) + [0.0] * len(padding))
    mean, gradient, _ = judged(values, None)
    padded_mean, padded_gradient, none = judged(values + padding, counted)
    assert padded_mean == pytest.approx(mean, rel=1e-6)
    torch.testing.assert_close(padded_gradient, gradient)
    finite = [at for at, number in enumerate(padding) if abs(number) < 1e10]
    assert not none[finite].any()


def test_weights_get_no_gradient():
    weights = torch.ones(3, requires_grad=True)
    values = torch.ones(3, requires_grad=True)
    PerRow(values, weights=weights).mean().backward()
    assert weights.grad is None
    assert values.grad.tolist() == pytest.approx([1 / 3] * 3)


def test_a_bare_tensor_is_taken_where_it_is_unambiguous():
    assert ONE.read("ce", torch.ones(3)).of == "private"
    assert StepRows({"public": 2}).read("kd", torch.ones(2)).of == "public"
    assert isinstance(BOTH.read("rkd", torch.tensor(1.0)), WholeStep)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            torch.ones(3),
            r"'kd' of shape \[3\] could be of either kind in a step",
        ),
        (
            PerRow(torch.ones(3)),
            r"3 private and 2 public rows: return PerRow\(values, of='private'\)",
        ),
        (
            PerRow(torch.ones(3), of="public"),
            r"of public rows has shape \[3\] in a step",
        ),
        (PerRow(torch.tensor(1.0), of="private"), r"shape \[\] .* or WholeStep\(scalar\)"),
        (PerRow(torch.ones(3, 2), of="private"), r"shape \[3, 2\]"),
        (WholeStep(torch.ones(3)), r"WholeStep of shape \[3\]: it needs one number; return PerRow"),
    ],
)
def test_a_loss_that_fits_no_rows_is_refused_with_what_to_return(loss, message):
    with pytest.raises(ValueError, match=message):
        BOTH.mean("kd", loss)


def test_what_is_no_loss_is_refused_by_name():
    # Called without its wrapper: in tests the types of arguments are checked first.
    read = getattr(StepRows.read, "__wrapped__", StepRows.read)
    with pytest.raises(TypeError, match="loss 'kd' must be PerRow"):
        read(BOTH, "kd", 1.5)
    with pytest.raises(ValueError, match=r"of private rows .* with 2 public rows"):
        StepRows({"public": 2}).mean("ce", PerRow(torch.ones(2), of="private"))


@pytest.mark.parametrize("factor", [torch.tensor(2.0), "2", None, np.float32(2)])
def test_a_factor_that_is_no_plain_number_is_refused_in_one_line(factor: object) -> None:
    # Called without its wrapper, as above.
    weighed = getattr(PerRow.__mul__, "__wrapped__", PerRow.__mul__)
    with pytest.raises(TypeError, match=r"PerRow can be weighed by an int or a float, got a \w+:"):
        weighed(PerRow(torch.ones(3)), factor)
