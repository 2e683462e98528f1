"""Fewer than 32 bits: what rounding may do, and what it costs on images."""

import numpy as np
import pytest

from paddle_reparam.deploy.precision import agreement
from paddle_reparam.errors import NothingProven, ReparamError, UsageError

# ---------------------------------------------------------------------------------------------------------------------
# What it costs on images


def scores(answers, classes=4):
    """Return `[N, classes]` with the largest score at each answer."""
    return np.eye(classes, dtype="float32")[answers] + np.float32(0.5)


def test_what_is_lost_is_counted_in_points():
    labels = np.arange(400) % 4
    reference, given = labels.copy(), labels.copy()
    reference[:100] = (reference[:100] + 1) % 4
    given[:102] = (given[:102] + 2) % 4
    report = agreement(scores(reference), scores(given), labels, largest_drop=0.5)
    assert (report.measure, report.images) == ("top-1", 400)
    assert (report.reference_accuracy, report.accuracy) == (0.75, 0.745)
    assert (report.drop, report.change, report.agreement) == (0.5, -0.5, 0.745)
    assert report.relative_error == pytest.approx(1 / 1.5)
    assert report.passed
    assert not agreement(scores(reference), scores(given), labels, largest_drop=0.499).passed
    assert "75.00% -> 74.50% (-0.50 points) on 400 images, the same answer for 74.50%" in str(report)
    gained = agreement(scores(given), scores(reference), labels, largest_drop=0.5)
    assert (gained.drop, gained.change, gained.passed) == (0.0, 0.5, True)


def test_several_labels_an_image_are_counted_label_by_label():
    labels = np.tile([[1, 0, -1, 1]], [100, 1])
    reference = np.tile(np.float32([[0.9, 0.1, 0.9, 0.8]]), [100, 1])
    given = reference.copy()
    given[:30, 3] = 0.2
    given[:, 2] = 0.1  # nobody knows
    report = agreement(reference, given, labels, largest_drop=10)
    assert (report.measure, report.reference_accuracy, report.accuracy) == ("label accuracy", 1.0, 0.9)
    assert (report.drop, report.passed) == (10.0, True)


@pytest.mark.parametrize(
    ("images", "largest_drop", "message"),
    [
        (0, 1.0, "0 images cannot show a drop of 1 points: give 100 images or more$"),
        (1, 1.0, r"1 images cannot show a drop of 1 points: give 100 images or more, or allow 100 points"),
        (199, 0.5, r"give 200 images or more, or allow 0.51 points$"),
        (99, 0.0, "99 images cannot show a drop of 0 points: give 100 images or more"),
    ],
)
def test_too_few_images_are_a_sentence(images, largest_drop, message):
    labels = np.arange(images) % 4
    with pytest.raises(NothingProven, match=message):
        agreement(scores(labels), scores(labels), labels, largest_drop)


def test_features_are_compared_by_their_error_alone():
    features = np.random.default_rng(0).standard_normal([3, 8]).astype("float32")
    report = agreement(features, features * np.float32(1.01), None, largest_drop=1.0)
    assert report.passed
    assert report.relative_error == pytest.approx(0.01, rel=1e-3)
    assert "features of 3 images, off by 1.0e-02" in str(report)


def test_what_cannot_be_compared_is_a_sentence():
    labels = np.arange(100) % 4
    with pytest.raises(ReparamError, match=r"the outputs have the shape \[100, 3\], the reference \[100, 4\]"):
        agreement(scores(labels), scores(labels)[:, :3], labels, 1.0)
    with pytest.raises(ReparamError, match=r"the network puts out \[100, 4\] for labels \[99\]"):
        agreement(scores(labels), scores(labels), labels[1:], 1.0)
    with pytest.raises(NothingProven, match="no label of the 100 images is known"):
        agreement(scores(labels), scores(labels), np.full(100, -1), 1.0)
    with pytest.raises(UsageError, match="what may be lost is nan percentage points"):
        agreement(scores(labels), scores(labels), labels, float("nan"))
