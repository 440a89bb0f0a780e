"""Inversion from paired answers: against independent computations, and with its control."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge
from torchmetrics.functional.image import structural_similarity_index_measure

from fedkd.privacy.attacks.inversion import Decoder, fit_decoder, judge, reconstruct, ssim


def test_likeness_of_flat_images_by_hand():
    a, b = np.full((8, 8, 1), 0.2), np.full((8, 8, 1), 0.6)
    # No variance: (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4).
    assert ssim(a, b) == pytest.approx(0.2401 / 0.4001)
    assert ssim(10 * a, 10 * b, data_range=10) == pytest.approx(0.2401 / 0.4001)


def test_likeness_of_small_images_is_that_of_one_window():
    rng = np.random.default_rng(0)
    a, b = rng.random((8, 8, 2)), rng.random((8, 8, 2))
    wanted = []
    for x, y in zip(a.transpose(2, 0, 1), b.transpose(2, 0, 1), strict=True):
        cov = np.cov(x.ravel(), y.ravel(), bias=True)
        top = (2 * x.mean() * y.mean() + 1e-4) * (2 * cov[0, 1] + 9e-4)
        bottom = (x.mean() ** 2 + y.mean() ** 2 + 1e-4) * (cov[0, 0] + cov[1, 1] + 9e-4)
        wanted.append(top / bottom)
    assert ssim(a, b) == pytest.approx(np.mean(wanted))


@pytest.mark.parametrize("shape", [(11, 11, 1), (28, 28, 1), (32, 20, 3)])
def test_likeness_of_larger_images_is_that_of_torchmetrics(shape):
    rng = np.random.default_rng(1)
    a = rng.random(shape)
    b = np.clip(a + rng.normal(0, 0.2, shape), 0, 1)
    one, other = (torch.from_numpy(image).permute(2, 0, 1)[None] for image in (a, b))
    _, full = structural_similarity_index_measure(
        one, other, data_range=1.0, return_full_image=True
    )
    # Theirs has a window at every pixel, beyond the edge too.
    assert ssim(a, b) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-6)


@given(st.integers(0, 1000), st.sampled_from([8, 13]))
def test_likeness_is_symmetric_and_largest_for_equal_images(seed, side):
    rng = np.random.default_rng(seed)
    a, b = rng.random((side, side, 1)), rng.random((side, side, 1))
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert -1 <= ssim(a, b) < ssim(a, a) == pytest.approx(1)


def test_the_decoder_is_kernel_ridge_regression():
    rng = np.random.default_rng(2)
    own, consensus = rng.dirichlet(np.ones(3), size=(2, 40))
    images = rng.random((40, 4, 4, 1)).astype(np.float32)
    decoder = fit_decoder(own, consensus, images, ridge=0.01)
    pairs = np.concatenate([own, consensus], axis=1)
    distances = np.sqrt(((pairs[:, None] - pairs) ** 2).sum(-1))[np.triu_indices(40, 1)]
    assert decoder.width == pytest.approx(np.median(distances))
    oracle = KernelRidge(alpha=0.4, kernel="rbf", gamma=1 / (2 * decoder.width**2))
    flat = images.reshape(40, -1).astype(np.float64)
    oracle.fit(pairs, flat - flat.mean(0))
    queries, others = rng.dirichlet(np.ones(3), size=(2, 5))
    wanted = oracle.predict(np.concatenate([queries, others], axis=1)) + flat.mean(0)
    assert decoder(queries, others).reshape(5, -1) == pytest.approx(wanted)
    smooth = fit_decoder(own, consensus, images, ridge=1e6)
    assert smooth(queries, others)[0] == pytest.approx(images.mean(0), abs=1e-4)


class Seen(Decoder):
    """Keeps what it is asked."""

    def __call__(self, own, consensus):
        self.pairs[:] = np.concatenate([own, consensus], axis=1)
        return super().__call__(own, consensus)


def test_what_is_decoded_is_a_sure_client_among_less_sure_others():
    seen = Seen(np.zeros((3, 6)), np.zeros((3, 2, 2, 1)), np.zeros((2, 2, 1)), 1.0)
    consensus = np.array([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.1, 0.5, 0.4]])
    reconstruct(seen, consensus)
    assert seen.pairs[:, :3] == pytest.approx(np.eye(3))
    # Class 0 leads with 0.8 and 0.6, class 1 with 0.5, class 2 never: the mean of all, 1.9 / 3.
    level = 1.9 / 3
    assert seen.pairs[:, 3:] == pytest.approx(
        np.array(
            [
                [0.7, 0.15, 0.15],
                [0.25, 0.5, 0.25],
                [(1 - level) / 2, (1 - level) / 2, level],
            ]
        )
    )


def a_client_with_a_mark(client_sees_it):
    """Three classes of images; in the client's private rows of each, a mark is bright.

    Public rows carry the mark more or less. A client that was trained on marked rows is the surer,
    the brighter the mark; the others do not care.
    """
    rng = np.random.default_rng(3)
    shapes = (rng.random((3, 8, 8, 1)) > 0.5) * 0.5
    mark = np.zeros((8, 8, 1))
    mark[:4] = 0.5
    classes, brightness = rng.integers(0, 3, 900), rng.beta(1, 3, 900)
    images = shapes[classes] + brightness[:, None, None, None] * mark
    images += rng.normal(0, 0.02, images.shape)

    def answers(sureness):
        odds = np.exp(np.eye(3)[classes] * sureness[:, None] + rng.normal(0, 0.1, (900, 3)))
        return odds / odds.sum(1, keepdims=True)

    own = answers(1 + 4 * brightness if client_sees_it else np.full(900, 2.0))
    consensus = answers(np.full(900, 2.0))
    public_means = np.stack([images[classes == one].mean(0) for one in range(3)])
    return own, consensus, images, shapes + mark, public_means


@pytest.mark.parametrize("client_sees_it", [True, False])
def test_private_images_are_found_where_answers_differ_and_not_where_they_do_not(client_sees_it):
    own, consensus, images, private, public = a_client_with_a_mark(client_sees_it)
    decoder = fit_decoder(own, consensus, images)
    made = reconstruct(decoder, consensus)
    found = [judge(made[one], private, public, one) for one in range(3)]
    assert [one.success for one in found] == [client_sees_it] * 3
    assert [one.too_close_to_public for one in found] == [not client_sees_it] * 3
    if client_sees_it:
        assert min(one.ssim for one in found) > 0.9


def test_a_hit_on_the_public_mean_does_not_count():
    rng = np.random.default_rng(4)
    private, public = rng.random((2, 3, 8, 8, 1))
    found = judge(private[1], private, public, 1)
    assert (found.success, found.too_close_to_public, found.ssim) == (True, False, pytest.approx(1))
    found = judge(public[1], private, public, 1)
    assert (found.success, found.too_close_to_public) == (False, True)
    assert found.ssim == pytest.approx(ssim(public[1], private[1]))
    # Another class, private or public: neither.
    for other in (private[2], public[2]):
        found = judge(other, private, public, 1)
        assert (found.success, found.too_close_to_public) == (False, False)


def test_classes_without_rows_are_left_out():
    rng = np.random.default_rng(5)
    private, public = rng.random((2, 3, 8, 8, 1))
    private[0], public[1] = np.nan, np.nan
    assert judge(private[1], private, public, 1).success
    with pytest.raises(ValueError, match="class 0 has no private row"):
        judge(public[0], private, public, 0)


def test_what_cannot_be_fitted_is_refused():
    rows, images = np.full((2, 2), 0.5), np.zeros((2, 4, 4, 1))
    with pytest.raises(ValueError, match="at least 2 public rows"):
        fit_decoder(rows[:1], rows[:1], images[:1])
    with pytest.raises(ValueError, match="ridge must be > 0"):
        fit_decoder(rows, rows, images, ridge=0)
    with pytest.raises(ValueError, match="sum to 1"):
        fit_decoder(rows * 4, rows, images)
    with pytest.raises(ValueError, match="data_range must be > 0"):
        ssim(images[0], images[0], data_range=0)
    # Rows that all look alike have a width, too.
    assert fit_decoder(rows, rows, images).width == 1
