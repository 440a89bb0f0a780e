import math

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from fedkd.metrics import MinibatchCKA, cka_matrix, linear_cka

ROWS, WIDTH, OTHER_WIDTH = 30, 7, 5


@pytest.fixture(name="features")
def _features():
    """Two layers that have something in common: the second is a noisy map of the first."""
    rng = np.random.default_rng(0)
    first = rng.normal(size=(ROWS, WIDTH)) * np.arange(1, WIDTH + 1)
    second = first @ rng.normal(size=(WIDTH, OTHER_WIDTH)) + 5 * rng.normal(
        size=(ROWS, OTHER_WIDTH)
    )
    return first, second


def biased_by_features(first, second):
    """Kornblith et al., 2019, equation in section 3.2: norms of cross-covariances."""
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    crossed = np.linalg.norm(second.T @ first) ** 2
    return crossed / (np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second))


def hsic_1(first, second):
    """Nguyen et al., 2021, equation 3, term by term."""
    n, ones = len(first), np.ones(len(first))
    K, L = first @ first.T, second @ second.T
    np.fill_diagonal(K, 0)
    np.fill_diagonal(L, 0)
    trace = np.trace(K @ L)
    product = (ones @ K @ ones) * (ones @ L @ ones) / ((n - 1) * (n - 2))
    return (trace + product - 2 / (n - 2) * (ones @ K @ L @ ones)) / (n * (n - 3))


def unbiased_by_terms(first, second):
    return hsic_1(first, second) / math.sqrt(hsic_1(first, first) * hsic_1(second, second))


def test_the_plain_estimate_agrees_with_its_formula_on_features(features):
    assert linear_cka(*features) == pytest.approx(biased_by_features(*features), abs=1e-12)


def test_the_unbiased_estimate_agrees_with_its_formula_term_by_term(features):
    expected = unbiased_by_terms(*features)
    assert linear_cka(*features, unbiased=True) == pytest.approx(expected, abs=1e-10)
    assert expected != pytest.approx(biased_by_features(*features), abs=1e-3)


@pytest.mark.parametrize("unbiased", [False, True])
class TestInvariances:
    def test_a_layer_is_like_itself(self, features, unbiased):
        first, _ = features
        assert linear_cka(first, first, unbiased=unbiased) == pytest.approx(1)

    def test_rotating_scaling_and_shifting_features_change_nothing(self, features, unbiased):
        first, second = features
        plain = linear_cka(first, second, unbiased=unbiased)
        rotation = ortho_group(WIDTH, seed=0).rvs()
        moved = -0.001 * first @ rotation + 3.0
        assert linear_cka(moved, second, unbiased=unbiased) == pytest.approx(plain)
        assert linear_cka(first, moved, unbiased=unbiased) == pytest.approx(1)

    def test_permuting_channels_of_feature_maps_changes_nothing(self, features, unbiased):
        _, second = features
        maps = torch.randn(ROWS, 6, 3, 2, generator=torch.Generator().manual_seed(0))
        shuffled = maps[:, [3, 0, 5, 1, 4, 2]]
        plain = linear_cka(maps, second, unbiased=unbiased)
        assert linear_cka(shuffled, second, unbiased=unbiased) == pytest.approx(plain)
        assert linear_cka(maps, shuffled, unbiased=unbiased) == pytest.approx(1)

    def test_shuffling_the_rows_of_one_side_only_destroys_the_similarity(self, features, unbiased):
        first, _ = features
        order = np.random.default_rng(1).permutation(ROWS)
        assert linear_cka(first[order], first, unbiased=unbiased) < 0.5
        assert linear_cka(first[order], first[order], unbiased=unbiased) == pytest.approx(1)

    def test_an_unequal_stretch_does_change_it(self, features, unbiased):
        first, _ = features
        stretched = first * np.array([30, 1, 1, 1, 1, 1, 1])
        assert linear_cka(first, stretched, unbiased=unbiased) < 0.9

    def test_a_constant_layer_is_like_nothing(self, features, unbiased):
        first, _ = features
        assert math.isnan(linear_cka(first, np.full((ROWS, 3), 0.1), unbiased=unbiased))


def test_only_the_unbiased_estimate_sees_that_wide_unrelated_layers_are_unrelated():
    first, second = np.random.default_rng(0).normal(size=(2, 20, 400))
    assert linear_cka(first, second) > 0.8
    assert abs(linear_cka(first, second, unbiased=True)) < 0.15


def test_the_matrix_holds_every_pair_of_layers(features):
    first, second = features
    rows = {"a": first, "b": first[:, :3] ** 2}
    columns = {"x": second, "y": first, "z": torch.tensor(second[:, :2])}
    matrix = cka_matrix(rows, columns)
    assert matrix.shape == (2, 3)
    for i, one in enumerate(rows.values()):
        for j, other in enumerate(columns.values()):
            assert matrix[i, j] == pytest.approx(linear_cka(one, other))
    assert matrix[0, 1] == pytest.approx(1)


def test_minibatches_sum_the_unbiased_terms_before_dividing(features):
    first, second = features
    similarity = MinibatchCKA()
    parts = [np.s_[:8], np.s_[8:18], np.s_[18:]]
    for part in parts:
        similarity.add({"a": first[part], "b": second[part]}, {"x": second[part]})
    pairs = [(first[part], second[part]) for part in parts]
    crossed = sum(hsic_1(one, other) for one, other in pairs)
    own = [sum(hsic_1(layer, layer) for layer in side) for side in zip(*pairs, strict=True)]
    assert similarity.first_layers == ("a", "b")
    assert similarity.second_layers == ("x",)
    expected = [[crossed / math.sqrt(own[0] * own[1])], [1]]
    assert similarity.matrix() == pytest.approx(np.array(expected), abs=1e-10)


def test_minibatches_come_close_to_all_rows_at_once():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(960, 12))
    second = first @ rng.normal(size=(12, 6)) + 2 * rng.normal(size=(960, 6))
    similarity = MinibatchCKA()
    for start in range(0, 960, 32):
        batch = np.s_[start : start + 32]
        similarity.add({"a": first[batch]}, {"x": second[batch]})
    whole = linear_cka(first, second, unbiased=True)
    assert similarity.matrix()[0, 0] == pytest.approx(whole, abs=0.02)


def test_what_cannot_be_compared_is_refused(features):
    first, second = features
    with pytest.raises(ValueError, match="features of the same rows, got 30 and 29"):
        cka_matrix({"a": first}, {"x": second[1:]})
    with pytest.raises(ValueError, match="unbiased CKA needs at least 4 rows, got 3 in 'first'"):
        linear_cka(first[:3], second[:3], unbiased=True)
    with pytest.raises(ValueError, match="CKA needs at least 2 rows, got 1"):
        linear_cka(first[:1], second[:1])
    with pytest.raises(ValueError, match="features of 'second' must be finite"):
        linear_cka(first, np.full((ROWS, 2), np.nan))
    with pytest.raises(ValueError, match="at least 1 layer, got 0"):
        cka_matrix({}, {"x": second})
    similarity = MinibatchCKA()
    with pytest.raises(ValueError, match="at least 1 batch, got 0"):
        similarity.matrix()
    similarity.add({"a": first}, {"x": second})
    with pytest.raises(ValueError, match=r"layers \('a',\) and \('x',\), got \('b',\)"):
        similarity.add({"b": first}, {"x": second})
