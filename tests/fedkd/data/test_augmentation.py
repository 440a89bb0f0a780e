"""What each change does to images, worked out by hand, and what a generator decides."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from fedkd.data.augmentation import (
    AUGMENTATIONS,
    AugmentationSettings,
    Mix,
    add_gaussian_noise,
    cutout,
    flip_horizontally,
    jitter_colours,
    mixup,
    pad_and_crop,
    rotate_quarter_turns,
    teacher_student_views,
)


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


def images(batch=6, channels=3, height=8, width=8, seed=1):
    return torch.rand(batch, channels, height, width, generator=stream(seed))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_runs_with_its_defaults_and_repeats(name, channels):
    function, source, defaults = AUGMENTATIONS[name]
    inputs = images(channels=channels)
    before = inputs.clone()

    def draw(seed):
        result = function(inputs, stream(seed), **defaults)
        return result[0] if name == "mixup" else result

    view = draw(7)
    assert source
    assert view.shape == inputs.shape
    assert view.dtype == inputs.dtype
    assert view.min() >= 0
    assert view.max() <= 1
    assert torch.equal(view, draw(7))
    assert any(not torch.equal(view, draw(seed)) for seed in range(8, 12))
    assert torch.equal(inputs, before)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_no_augmentation_touches_the_global_generator(name):
    state = torch.get_rng_state()
    AUGMENTATIONS[name].function(images(), stream(), **AUGMENTATIONS[name].defaults)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_half_precision_stays_half_precision_and_empty_batches_stay_empty(name):
    function, _, defaults = AUGMENTATIONS[name]
    for inputs in (images().half(), images(batch=0)):
        result = function(inputs, stream(), **defaults)
        view = result[0] if name == "mixup" else result
        assert (view.dtype, view.shape) == (inputs.dtype, inputs.shape)


def test_rows_draw_for_themselves():
    inputs = images(batch=1).expand(40, -1, -1, -1)
    flipped = flip_horizontally(inputs, stream(), probability=0.5)
    distinct = Counter("plain" if torch.equal(row, inputs[0]) else "mirrored" for row in flipped)
    assert 10 <= distinct["mirrored"] <= 30
    assert torch.equal(flip_horizontally(inputs, stream(), probability=1.0), inputs.flip(3))
    assert torch.equal(flip_horizontally(inputs, stream(), probability=0), inputs)


def test_a_crop_is_the_image_shifted_by_at_most_the_padding():
    inputs = images(batch=300, channels=2, height=4, width=6)
    cropped = pad_and_crop(inputs, stream(), padding=1)
    padded = F.pad(inputs, (1, 1, 1, 1))
    shifts = Counter()
    for row, image in enumerate(cropped):
        found = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if torch.equal(image, padded[row, :, top : top + 4, left : left + 6])
        ]
        assert len(found) == 1
        shifts[found[0]] += 1
    # 9 shifts, 33 rows each on average, standard deviation 5.4.
    assert set(shifts) == {(top, left) for top in range(3) for left in range(3)}
    assert max(shifts.values()) < 33 + 5 * 5.4


def test_quarter_turns_are_the_four_rotations():
    inputs = images(batch=80, height=5, width=5)
    turns = Counter()
    for image, turned in zip(inputs, rotate_quarter_turns(inputs, stream()), strict=True):
        turns[[torch.equal(turned, image.rot90(k, dims=(1, 2))) for k in range(4)].index(True)] += 1
    assert sorted(turns) == [0, 1, 2, 3]
    assert min(turns.values()) >= 8


def test_colour_jitter_follows_its_formulas():
    # One pixel (0.2, 0.4, 0.6) and one black one. Grey of the first: .299*.2+.587*.4+.114*.6=.363
    inputs = torch.tensor([0.2, 0.4, 0.6])[None, :, None, None] * torch.tensor([1.0, 0.0])
    factor = 1 + 0.5 * (2 * torch.rand(1, generator=stream(3)).item() - 1)
    colour = inputs[0, :, 0, 0]

    brighter = jitter_colours(inputs, stream(3), brightness=0.5, contrast=0, saturation=0)
    torch.testing.assert_close(brighter[0, :, 0, 0], factor * colour)

    contrasted = jitter_colours(inputs, stream(3), brightness=0, contrast=0.5, saturation=0)
    expected = factor * colour + (1 - factor) * 0.363 / 2
    torch.testing.assert_close(contrasted[0, :, 0, 0], expected.clamp(0, 1))

    saturated = jitter_colours(inputs, stream(3), brightness=0, contrast=0, saturation=0.5)
    torch.testing.assert_close(saturated[0, :, 0, 0], factor * colour + (1 - factor) * 0.363)


def test_saturation_leaves_grey_images_alone():
    grey = images(channels=1)
    assert torch.equal(jitter_colours(grey, stream(), brightness=0, contrast=0, saturation=1), grey)
    with pytest.raises(ValueError, match="needs 1 or 3 channels, got 2"):
        jitter_colours(images(channels=2), stream())


def test_noise_has_its_standard_deviation_and_stays_in_range():
    inputs = torch.full((50, 1, 20, 20), 0.5)
    noise = add_gaussian_noise(inputs, stream(), std=0.1) - inputs
    # 20,000 values: the estimate's own standard error is 0.0005.
    assert noise.std().item() == pytest.approx(0.1, abs=0.0025)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.004)
    loud = add_gaussian_noise(inputs, stream(), std=5)
    assert (loud.min(), loud.max()) == (0, 1)


def test_cutout_erases_one_square_that_the_border_may_cut():
    inputs = torch.ones(200, 2, 7, 9)
    erased = cutout(inputs, stream(), size=4) == 0
    assert torch.equal(erased[:, 0], erased[:, 1])
    for hole in erased[:, 0]:
        rows, columns = hole.any(1).nonzero(), hole.any(0).nonzero()
        height, width = len(rows), len(columns)
        assert hole.sum() == height * width
        # A centre in the corner leaves half the square and its centre row: at least 2 of 4.
        assert 2 <= height <= 4
        assert 2 <= width <= 4
    assert (erased[:, 0].sum((1, 2)) == 16).any()
    # Any pixel can be hit, also in the corners.
    assert erased[:, 0].any(0).all()


def test_mixup_blends_each_row_with_its_partner():
    inputs = images(batch=5)
    mixed, mix = mixup(inputs, stream(), alpha=1.0)
    assert sorted(mix.permutation.tolist()) == [0, 1, 2, 3, 4]
    assert 0 < mix.share < 1
    for row, partner in enumerate(mix.permutation.tolist()):
        expected = mix.share * inputs[row] + (1 - mix.share) * inputs[partner]
        torch.testing.assert_close(mixed[row], expected)


def test_mixup_shares_have_the_moments_of_beta():
    generator = stream()
    shares = torch.tensor(
        [mixup(images(batch=2), generator, alpha=0.5)[1].share for _ in range(2000)]
    )
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)) = 1/8.
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(0.125, abs=0.006)


def test_labels_and_losses_follow_the_mix():
    mix = Mix(torch.tensor([2, 0, 1]), 0.75)
    labels = torch.tensor([0, 3, 1])
    targets = mix.apply_to_labels(labels, num_classes=4)
    expected = torch.tensor([[0.75, 0.25, 0, 0], [0.25, 0, 0, 0.75], [0, 0.75, 0, 0.25]])
    torch.testing.assert_close(targets, expected)
    logits = torch.randn(3, 4, generator=stream())
    partners = labels[mix.permutation]
    by_hand = 0.75 * F.cross_entropy(logits, labels) + 0.25 * F.cross_entropy(logits, partners)
    torch.testing.assert_close(F.cross_entropy(logits, targets), by_hand)


EVERYTHING = {
    "horizontal_flip": 0.5,
    "pad_and_crop": 1,
    "quarter_turns": True,
    "brightness": 0.4,
    "contrast": 0.3,
    "saturation": 0.2,
    "gaussian_noise": 0.05,
    "cutout": 3,
    "mixup": 0.4,
}


def test_settings_are_off_by_default_and_draw_nothing():
    generator = stream()
    state = generator.get_state()
    inputs = images()
    views = teacher_student_views(inputs, AugmentationSettings(), generator)
    assert views.student is inputs
    assert views.teacher is inputs
    assert views.mix is None
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("change", [name for name in EVERYTHING if name != "mixup"])
def test_each_setting_changes_the_view(change):
    inputs = images()
    settings = AugmentationSettings(**{change: EVERYTHING[change]})
    assert not torch.equal(settings.apply(inputs, stream()), inputs)


@pytest.mark.parametrize(
    ("change", "function", "arguments"),
    [
        ("horizontal_flip", flip_horizontally, {"probability": 0.5}),
        ("pad_and_crop", pad_and_crop, {"padding": 1}),
        ("quarter_turns", rotate_quarter_turns, {}),
        ("contrast", jitter_colours, {"brightness": 0, "contrast": 0.3, "saturation": 0}),
        ("gaussian_noise", add_gaussian_noise, {"std": 0.05}),
        ("cutout", cutout, {"size": 3}),
    ],
)
def test_a_setting_means_its_function(change, function, arguments):
    settings = AugmentationSettings(**{change: EVERYTHING[change]})
    expected = function(images(), stream(5), **arguments)
    assert torch.equal(settings.apply(images(), stream(5)), expected)


@pytest.mark.parametrize("mixup_alpha", [0.0, 0.4])
def test_the_teacher_sees_what_its_name_says(mixup_alpha):
    inputs = images()
    settings = {**EVERYTHING, "mixup": mixup_alpha}
    same, clean, independent = (
        teacher_student_views(
            inputs, AugmentationSettings(**settings, teacher_view=view), stream(2)
        )
        for view in ("same", "clean", "independent")
    )
    assert torch.equal(same.teacher, same.student)
    assert torch.equal(clean.teacher, inputs)
    assert not torch.equal(independent.teacher, independent.student)
    assert not torch.equal(independent.teacher, inputs)
    # The student learns from the same images whatever the teacher sees.
    assert torch.equal(same.student, clean.student)
    assert torch.equal(same.student, independent.student)


def test_targets_are_mixed_once():
    probabilities = torch.eye(6)
    settings = {"mixup": 1.0}
    same = teacher_student_views(
        images(), AugmentationSettings(**settings, teacher_view="same"), stream(2)
    )
    clean = teacher_student_views(
        images(), AugmentationSettings(**settings, teacher_view="clean"), stream(2)
    )
    assert torch.equal(same.targets(probabilities), probabilities)
    torch.testing.assert_close(
        clean.targets(probabilities),
        clean.mix.share * probabilities
        + (1 - clean.mix.share) * probabilities[clean.mix.permutation],
    )
    unmixed = teacher_student_views(images(), AugmentationSettings(teacher_view="clean"), stream(2))
    assert torch.equal(unmixed.targets(probabilities), probabilities)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flip_horizontally(images(), stream(), probability=1.5), r"\[0, 1\], got 1\.5"),
        (lambda: pad_and_crop(images(), stream(), padding=-1), "padding must be >= 0, got -1"),
        (lambda: rotate_quarter_turns(images(width=7), stream()), "square images, got 8x7"),
        (lambda: jitter_colours(images(), stream(), contrast=2), r"contrast .* got 2"),
        (lambda: add_gaussian_noise(images(), stream(), std=-0.1), r"std must be >= 0, got -0\.1"),
        (lambda: cutout(images(height=6), stream(), size=7), r"\[1, 6\] on 6x8 images, got 7"),
        (lambda: mixup(images(), stream(), alpha=0), "alpha must be > 0 and finite, got 0"),
    ],
)
def test_impossible_changes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "wrong", [{"horizontal_flip": 1.1}, {"cutout": -1}, {"teacher_view": "dirty"}, {"flip": 0.5}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        AugmentationSettings(**wrong)


@pytest.mark.parametrize(
    ("changed", "features", "text"),
    [
        ({"horizontal_flip": 0.5}, False, False),
        ({"pad_and_crop": 2}, False, False),
        ({"quarter_turns": True}, False, False),
        ({"brightness": 0.1}, False, False),
        ({"contrast": 0.1}, False, False),
        ({"saturation": 0.1}, False, False),
        ({"gaussian_noise": 0.1}, False, False),
        ({"cutout": 2}, False, False),
        ({"mixup": 0.2}, True, False),
        ({"teacher_view": "clean"}, True, True),
    ],
)
def test_changes_of_pixels_are_refused_by_name_on_features_and_texts(changed, features, text):
    settings = AugmentationSettings(**changed)
    settings.check("pictures", "training.augmentation")
    (name,) = changed
    for kind, possible in (("features", features), ("text", text)):
        if possible:
            settings.check(kind, "training.augmentation")
        else:
            with pytest.raises(ValueError, match=rf"training\.augmentation\.{name} is .* {kind}"):
                settings.check(kind, "training.augmentation")


def test_features_are_mixed_as_pictures_are():
    rows = torch.tensor([[0.0, 10.0], [2.0, -10.0]])
    mixed, mix = mixup(rows, torch.Generator().manual_seed(0))
    assert torch.allclose(mixed, mix.share * rows + (1 - mix.share) * rows[mix.permutation])
