"""Agreement of a stolen model with its original."""

import math

import numpy as np
import pytest

from fedkd.privacy.attacks.figures import clopper_pearson
from fedkd.privacy.attacks.stealing import agreement


def test_agreement_by_hand():
    own = np.log([[3.0, 1.0], [1.0, 1.0], [1.0, 3.0]])
    stolen = np.log([[1.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
    found = agreement(stolen, own)
    # The first class counts where both are equal: rows 0 and 1 agree.
    assert found.top1.value == pytest.approx(2 / 3)
    assert (found.top1.low, found.top1.high) == clopper_pearson(2, 3)
    # KL(own || stolen): ln 2 - H(3/4); 0; 1/2 ln 3.
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    rows = math.log(2) - entropy, 0, math.log(3) / 2
    assert found.kl == pytest.approx(sum(rows) / 3)


def test_a_copy_agrees_with_its_original():
    logits = np.random.default_rng(0).normal(size=(400, 10))
    found = agreement(logits, logits)
    assert (found.top1.value, found.top1.high, found.kl) == (1, 1, 0)
    assert found.top1.low > 0.99


def test_no_row_is_no_agreement():
    with pytest.raises(ValueError, match="trials must be >= 1"):
        agreement(np.zeros((0, 3)), np.zeros((0, 3)))
