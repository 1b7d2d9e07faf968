"""Section 4: log-odds, calibration rows, confidence, threshold."""

from fractions import Fraction

import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit

import mscnn_helpers as mscnn
from mscnn_helpers import COMMON_PRIOR, COMMON_STRENGTH, ROW_STRENGTH

# ------------------------------------------------------------------------------------------------------------
# Log-odds
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("category", "odds"), [(0, Fraction(1, 5)), (1, Fraction(2, 4)), (2, Fraction(3, 3))])
def test_log_odds_of_known_probabilities(category, odds):
    logits = np.log([[1.0, 2.0, 3.0]]) + 7.0  # probabilities 1/6, 2/6, 3/6; a common shift changes nothing
    assert mscnn.log_odds(logits, np.array([category]))[0] == pytest.approx(np.log(float(odds)), abs=1e-12)


def test_each_image_has_its_own_category():
    logits = np.random.default_rng(0).normal(size=(6, 4))
    category = np.array([3, 0, 1, 2, 2, 0])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    p = p[np.arange(6), category]
    np.testing.assert_allclose(mscnn.log_odds(logits, category), np.log(p / (1 - p)), rtol=1e-12)


def test_log_odds_rank_images_that_a_float32_softmax_takes_for_equal():
    logits = np.array([[30, 0, 0], [60, 0, 0], [600, 0, 0], [-600, 0, 0]], np.float32)
    p = np.exp(logits[:2]) / np.exp(logits[:2]).sum(axis=1, keepdims=True)
    assert p.dtype == np.float32 and p[0, 0] == p[1, 0] == 1  # a float32 softmax has lost the difference
    got = mscnn.log_odds(logits, np.zeros(4, int))
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, np.array([30, 60, 600, -600]) - np.log(2), rtol=1e-14)


def test_log_odds_leave_their_input_alone():
    logits = np.arange(6.0).reshape(2, 3)
    before = logits.copy()
    mscnn.log_odds(logits, np.array([0, 2]))
    np.testing.assert_array_equal(logits, before)


def test_log_odds_of_no_images():
    got = mscnn.log_odds(np.zeros((0, 10), np.float32), np.zeros(0, int))
    assert got.shape == (0,) and got.dtype == np.float64


@pytest.mark.parametrize("category", [0, 3])
def test_log_odds_tensor_says_the_same(category):
    logits = np.random.default_rng(1).normal(scale=20, size=(50, 4)).astype(np.float32)
    got = mscnn.log_odds_tensor(mscnn.tf.constant(logits), category)
    np.testing.assert_allclose(got, mscnn.log_odds(logits, np.full(50, category)), rtol=1e-5, atol=1e-5)


def test_sigmoid_does_not_overflow():
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(mscnn.sigmoid(np.array([-1e6, 0.0, 1e6])), [0, 0.5, 1])


# ------------------------------------------------------------------------------------------------------------
# Calibration rows
# ------------------------------------------------------------------------------------------------------------

NEARLY_NO_PRIOR = np.full(3, 1e-9)


def opinions(count: int, row=(-0.5, 0.8, 0.3), seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-odds of both stages, and whether Stage 1 is right, drawn with the probability that `row` gives."""
    rng = np.random.default_rng(seed)
    stage1, stage2 = rng.normal(2, 2, count), rng.normal(1, 3, count)
    return stage1, stage2, rng.random(count) < expit(row[0] + row[1] * stage1 + row[2] * stage2)


def penalised_loss(row, stage1, stage2, right, towards, strength) -> float:
    """The loss in its plainest form: what was given to the truth, and the Gaussian prior."""
    p = expit(row[0] + row[1] * stage1 + row[2] * stage2)
    return -np.log(np.where(right, p, 1 - p)).sum() + 0.5 * (strength * (row - towards) ** 2).sum()


def test_gradient_of_the_calibration_is_right(monkeypatch):
    """The loss handed to the optimiser is the plain one, and its gradient is the slope of that."""
    handed = {}

    def spy(function, start, **options):
        handed["loss"] = function
        return scipy.optimize.OptimizeResult(x=start)

    monkeypatch.setattr(scipy.optimize, "minimize", spy)
    data = (*opinions(40), np.array([0.1, 0.4, 0.9]), np.array([2.0, 3.0, 5.0]))
    mscnn.fit_calibration_row(*data)
    for row in np.random.default_rng(2).normal(size=(5, 3)):
        loss, gradient = handed["loss"](row)
        assert loss == pytest.approx(penalised_loss(row, *data))
        np.testing.assert_allclose(gradient, scipy.optimize.approx_fprime(row, penalised_loss, 1e-6, *data), rtol=1e-3)


def test_calibration_finds_the_lowest_loss():
    data = (*opinions(100), COMMON_PRIOR, COMMON_STRENGTH)
    row = mscnn.fit_calibration_row(*data)
    best = scipy.optimize.minimize(penalised_loss, [0, 1, 1], args=data, method="Nelder-Mead", tol=1e-10).x
    np.testing.assert_allclose(row, best, atol=1e-3)


def test_calibration_finds_known_coefficients_again():
    row = mscnn.fit_calibration_row(*opinions(100_000, (-0.5, 0.8, 0.3)), COMMON_PRIOR, COMMON_STRENGTH)
    np.testing.assert_allclose(row, (-0.5, 0.8, 0.3), atol=0.03)


def test_calibration_without_a_prior_is_plain_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    stage1, stage2, right = opinions(2000)
    plain = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(np.column_stack([stage1, stage2]), right)
    row = mscnn.fit_calibration_row(stage1, stage2, right, np.zeros(3), NEARLY_NO_PRIOR)
    np.testing.assert_allclose(row, [plain.intercept_[0], *plain.coef_[0]], rtol=2e-3)


def test_without_images_the_row_is_the_prior():
    none = np.zeros(0)
    towards = np.array([0.3, 0.7, 0.2])
    np.testing.assert_array_equal(
        mscnn.fit_calibration_row(none, none, none.astype(bool), towards, ROW_STRENGTH), towards
    )


@pytest.mark.parametrize("true_row", [(0, 0.8, -0.6), (0, -0.6, 0.8), (1, -0.6, -0.6)])
def test_more_evidence_never_lowers_the_confidence(true_row):
    row = mscnn.fit_calibration_row(*opinions(3000, true_row), COMMON_PRIOR, COMMON_STRENGTH)
    assert (row[1:] >= 0).all()
    for fitted, true in zip(row[1:], true_row[1:], strict=True):
        assert (fitted == 0) == (true < 0)


def test_a_stronger_prior_holds_the_row_closer():
    towards, data = np.array([1.0, 0.2, 1.2]), opinions(200)
    distances = []
    for factor in (1e-3, 1e-1, 1, 10, 1e3, 1e6):
        pull = mscnn.fit_calibration_row(*data, towards, factor * ROW_STRENGTH) - towards
        distances.append(np.sqrt((ROW_STRENGTH * pull**2).sum()))
    assert distances[0] > 0.5 and distances[-1] < 1e-2
    assert (np.diff(distances) < 0).all()


@pytest.mark.parametrize("all_are", [True, False])
def test_a_category_without_a_counter_example_stays_finite(all_are):
    """A few images, all right (or all wrong), would drive an unshrunk regression to infinity."""
    stage1 = np.full(20, 3.0)
    row = mscnn.fit_calibration_row(stage1, stage1, np.full(20, all_are), COMMON_PRIOR, ROW_STRENGTH)
    assert np.isfinite(row).all() and (row[1:] >= 0).all()
    assert (row[0] > 0) == all_are


# ------------------------------------------------------------------------------------------------------------
# Confidence and decision
# ------------------------------------------------------------------------------------------------------------


def test_combined_confidence_uses_the_row_of_each_category():
    rows = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0], [-1.0, 0.5, 0.25]])
    category, stage1, stage2 = np.array([2, 0, 1, 2]), np.array([4.0, -3.0, 9.0, 0.0]), np.array([8.0, 5.0, -0.5, 0.0])
    got = mscnn.combined_confidence(rows, category, stage1, stage2)
    np.testing.assert_allclose(got, expit([-1 + 2 + 2, -3, 1 - 1, -1]), rtol=1e-14)
    assert mscnn.combined_confidence(rows, category[:0], stage1[:0], stage2[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.7, [5, 1, 2, 5]), (0.0, [0, 1, 2, 5]), (1.0, [5, 5, 2, 5]), (np.nextafter(0.7, 1), [5, 5, 2, 5])],
)
def test_accepted_is_what_reaches_the_threshold(threshold, expected):
    """Equal to the threshold is accepted; a confidence that is not a number is not."""
    confidence = np.array([np.nextafter(0.7, 0), 0.7, 1.0, np.nan])
    np.testing.assert_array_equal(mscnn.accept(np.array([0, 1, 2, 3]), confidence, threshold, other=5), expected)


def test_log_loss_by_category_by_hand():
    category, right = np.array([0, 0, 2, 2, 2]), np.array([True, False, True, True, False])
    confidence = np.array([0.5, 0.75, 1.0, 0.25, 0.0])
    expected = [(np.log(2) + np.log(4)) / 2, np.nan, np.log(4) / 3, np.nan]
    got = mscnn.log_loss_by_category(category, confidence, right, 4)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_a_certain_error_costs_much_but_not_infinitely():
    loss = mscnn.log_loss_by_category(np.array([0]), np.array([1.0]), np.array([False]), 1)[0]
    assert loss == pytest.approx(-np.log(1e-12))


def test_the_true_confidence_has_the_lowest_log_loss():
    """A proper score: neither boasting nor hedging pays."""
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    right, category = rng.random(len(p)) < p, np.zeros(len(p), int)
    losses = [mscnn.log_loss_by_category(category, expit(k * np.log(p / (1 - p))), right, 1)[0] for k in (0.5, 1, 2)]
    assert losses[1] < min(losses[0], losses[2])
