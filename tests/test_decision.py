"""Log-odds, calibration coefficients, confidence, threshold."""

import itertools
from fractions import Fraction
from math import comb, factorial

import numpy as np
import pytest
import scipy.optimize
from scipy.special import expit

import mscnn_helpers as mscnn
from mscnn_helpers import MSCNNError
from mscnn_parts.decision import CATEGORY_PRECISION, PRIOR_MEAN, SHARED_PRECISION, confidence_log_odds, fit_calibration
from mscnn_parts.layers import log_odds_tensor
from mscnn_parts.ood import OODStatistics, fit_feature_statistics, fit_ood_scale, ood_terms
from mscnn_parts.thresholds import check_certification_size, risk_upper_bound

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


@pytest.mark.parametrize(("category", "expected"), [(0, [-4.0, 2.0]), (1, [-3.0, -2.0]), (2, [3.0, -5.0])])
def test_margin_is_the_lead_over_the_nearest_rival(category, expected):
    logits = np.array([[-1, 0, 3], [4, 2, -1]], np.float32)
    before = logits.copy()
    got = mscnn.margin(logits, np.array([category, category]))
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(logits, before)


def test_of_two_categories_the_margin_is_the_log_odds():
    logits, category = np.random.default_rng(0).normal(size=(20, 2)), np.arange(20) % 2
    np.testing.assert_allclose(mscnn.margin(logits, category), mscnn.log_odds(logits, category), rtol=1e-12)
    assert mscnn.margin(logits[:0], category[:0]).shape == (0,)


@pytest.mark.parametrize("category", [0, 3])
def test_log_odds_tensor_says_the_same(category):
    logits = np.random.default_rng(1).normal(scale=20, size=(50, 4)).astype(np.float32)
    got = log_odds_tensor(mscnn.tf.constant(logits), category)
    np.testing.assert_allclose(got, mscnn.log_odds(logits, np.full(50, category)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Calibration rows
# ------------------------------------------------------------------------------------------------------------

NEARLY_NO_PRIOR = np.full(3, 1e-9)


def scores(count: int, row=(-0.5, 0.8, 0.3), seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-odds of both stages, and whether Stage 1 is correct, drawn with the probability that `row` gives."""
    rng = np.random.default_rng(seed)
    stage1, stage2 = rng.normal(2, 2, count), rng.normal(1, 3, count)
    return stage1, stage2, rng.random(count) < expit(row[0] + row[1] * stage1 + row[2] * stage2)


def penalised_loss(row, stage1, stage2, correct, towards, strength) -> float:
    """The loss in its plainest form: what was given to the truth, and the Gaussian prior."""
    p = expit(row[0] + row[1] * stage1 + row[2] * stage2)
    return -np.log(np.where(correct, p, 1 - p)).sum() + 0.5 * (strength * (row - towards) ** 2).sum()


def test_gradient_of_the_calibration_is_right(monkeypatch):
    """The loss handed to the optimizer is the plain one, and its gradient is the slope of that."""
    handed = {}

    def spy(function, start, **options):
        handed["loss"] = function
        return scipy.optimize.OptimizeResult(x=start)

    monkeypatch.setattr(scipy.optimize, "minimize", spy)
    data = (*scores(40), np.array([0.1, 0.4, 0.9]), np.array([2.0, 3.0, 5.0]))
    fit_calibration(*data)
    for row in np.random.default_rng(2).normal(size=(5, 3)):
        loss, gradient = handed["loss"](row)
        assert loss == pytest.approx(penalised_loss(row, *data))
        np.testing.assert_allclose(gradient, scipy.optimize.approx_fprime(row, penalised_loss, 1e-6, *data), rtol=1e-3)


def test_calibration_finds_the_lowest_loss():
    data = (*scores(100), PRIOR_MEAN, SHARED_PRECISION)
    row = fit_calibration(*data)
    best = scipy.optimize.minimize(penalised_loss, [0, 1, 1], args=data, method="Nelder-Mead", tol=1e-10).x
    np.testing.assert_allclose(row, best, atol=1e-3)


def test_calibration_finds_known_coefficients_again():
    row = fit_calibration(*scores(100_000, (-0.5, 0.8, 0.3)), PRIOR_MEAN, SHARED_PRECISION)
    np.testing.assert_allclose(row, (-0.5, 0.8, 0.3), atol=0.03)


def test_calibration_without_a_prior_is_plain_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    stage1, stage2, correct = scores(2000)
    plain = LogisticRegression(C=1e9, tol=1e-10, max_iter=1000).fit(np.column_stack([stage1, stage2]), correct)
    row = fit_calibration(stage1, stage2, correct, np.zeros(3), NEARLY_NO_PRIOR)
    np.testing.assert_allclose(row, [plain.intercept_[0], *plain.coef_[0]], rtol=2e-3)


def test_without_images_the_row_is_the_prior():
    none = np.zeros(0)
    towards = np.array([0.3, 0.7, 0.2])
    np.testing.assert_array_equal(fit_calibration(none, none, none.astype(bool), towards, CATEGORY_PRECISION), towards)


@pytest.mark.parametrize("true_row", [(0, 0.8, -0.6), (0, -0.6, 0.8), (1, -0.6, -0.6)])
def test_more_evidence_never_lowers_the_confidence(true_row):
    row = fit_calibration(*scores(3000, true_row), PRIOR_MEAN, SHARED_PRECISION)
    assert (row[1:] >= 0).all()
    for fitted, true in zip(row[1:], true_row[1:], strict=True):
        assert (fitted == 0) == (true < 0)


def test_a_stronger_prior_holds_the_row_closer():
    towards, data = np.array([1.0, 0.2, 1.2]), scores(200)
    distances = []
    for factor in (1e-3, 1e-1, 1, 10, 1e3, 1e6):
        pull = fit_calibration(*data, towards, factor * CATEGORY_PRECISION) - towards
        distances.append(np.sqrt((CATEGORY_PRECISION * pull**2).sum()))
    assert distances[0] > 0.5 and distances[-1] < 1e-2
    assert (np.diff(distances) < 0).all()


@pytest.mark.parametrize("all_are", [True, False])
def test_a_category_without_a_counter_example_stays_finite(all_are):
    """A few images, all right (or all wrong), would drive an unshrunk regression to infinity."""
    stage1 = np.full(20, 3.0)
    row = fit_calibration(stage1, stage1, np.full(20, all_are), PRIOR_MEAN, CATEGORY_PRECISION)
    assert np.isfinite(row).all() and (row[1:] >= 0).all()
    assert (row[0] > 0) == all_are


# ------------------------------------------------------------------------------------------------------------
# Confidence and decision
# ------------------------------------------------------------------------------------------------------------


def test_both_opinions_are_combined_by_the_row_of_each_category():
    rows = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 2.0], [-1.0, 0.5, 0.25]])
    category, stage1, stage2 = np.array([2, 0, 1, 2]), np.array([4.0, -3.0, 9.0, 0.0]), np.array([8.0, 5.0, -0.5, 0.0])
    got = confidence_log_odds(rows, category, stage1, stage2)
    np.testing.assert_array_equal(got, [-1 + 2 + 2, -3, 1 - 1, -1])
    assert confidence_log_odds(rows, category[:0], stage1[:0], stage2[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.7, [5, 1, 2, 5]), (0.0, [0, 1, 2, 5]), (1.0, [5, 5, 2, 5]), (np.nextafter(0.7, 1), [5, 5, 2, 5])],
)
def test_accepted_is_what_reaches_the_threshold(threshold, expected):
    """Equal to the threshold is accepted; a confidence that is not a number is not."""
    confidence = np.array([np.nextafter(0.7, 0), 0.7, 1.0, np.nan])
    np.testing.assert_array_equal(
        mscnn.apply_threshold(np.array([0, 1, 2, 3]), confidence, threshold, other=5), expected
    )


def test_log_loss_by_category_by_hand():
    category, correct = np.array([0, 0, 2, 2, 2]), np.array([True, False, True, True, False])
    confidence = np.array([0.5, 0.75, 1.0, 0.25, 0.0])
    expected = [(np.log(2) + np.log(4)) / 2, np.nan, np.log(4) / 3, np.nan]
    got = mscnn.log_loss_by_category(category, confidence, correct, 4)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_a_certain_error_costs_much_but_not_infinitely():
    loss = mscnn.log_loss_by_category(np.array([0]), np.array([1.0]), np.array([False]), 1)[0]
    assert loss == pytest.approx(-np.log(1e-12))


def test_the_true_confidence_has_the_lowest_log_loss():
    """A proper score: neither boasting nor hedging pays."""
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    correct, category = rng.random(len(p)) < p, np.zeros(len(p), int)
    losses = [mscnn.log_loss_by_category(category, expit(k * np.log(p / (1 - p))), correct, 1)[0] for k in (0.5, 1, 2)]
    assert losses[1] < min(losses[0], losses[2])


# ------------------------------------------------------------------------------------------------------------
# Thresholds
# ------------------------------------------------------------------------------------------------------------


def binomial_tail(errors: int, accepted: int, rate: Fraction) -> Fraction:
    """Probability of so few errors, by summing the terms."""
    terms = (comb(accepted, e) * rate**e * (1 - rate) ** (accepted - e) for e in range(errors + 1))
    return sum(terms, Fraction(0))


@pytest.mark.parametrize(("errors", "accepted"), [(0, 1), (0, 30), (3, 30), (29, 30), (7, 1625)])
def test_the_error_bound_is_where_so_few_errors_become_improbable(errors, accepted):
    bound = risk_upper_bound(errors, accepted, 0.05)
    assert float(binomial_tail(errors, accepted, Fraction(bound))) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize(("errors", "accepted"), [(0, 0), (5, 5)])
def test_the_error_bound_is_1_where_nothing_speaks_against_it(errors, accepted):
    assert risk_upper_bound(errors, accepted, 0.05) == 1


def sorted_images(*runs: tuple[int, bool]) -> tuple[np.ndarray, np.ndarray]:
    """Images of falling confidence: so many correct ones, so many incorrect ones, ..."""
    correct = np.repeat([one for _, one in runs], [count for count, _ in runs])
    return np.linspace(0.99, 0.01, len(correct)), correct


def test_a_certificate_takes_in_what_its_bound_allows():
    confidence, correct = sorted_images((900, True), (600, False))
    found = mscnn.threshold_for_risk(confidence, correct, 0.05)
    steps = 11  # of a binary search among 1,500
    accepted = confidence >= found.threshold
    assert (found.accepted, found.errors) == (accepted.sum(), (accepted & ~correct).sum())
    assert found.bound == risk_upper_bound(found.errors, found.accepted, 0.05 / steps) <= 0.05
    assert found.accepted > 900
    further = [risk_upper_bound(e, 900 + e, 0.05 / steps) for e in range(found.errors + 1, 600)]
    assert min(further) > 0.05, "no lower threshold would do"


def test_a_certificate_counts_all_images_of_the_same_confidence():
    confidence = np.repeat([0.9, 0.5], [500, 500])
    correct = np.r_[np.ones(500, bool), np.zeros(500, bool)]
    found = mscnn.threshold_for_risk(confidence, correct, 0.05)
    assert (found.threshold, found.errors, found.accepted) == (0.9, 0, 500)


def test_too_few_images_are_refused():
    with pytest.raises(MSCNNError, match=r"1\.00% errors at the most needs \d+ images .* certification split has 250"):
        mscnn.threshold_for_risk(*sorted_images((250, True)), 0.01)


def test_a_bound_that_cannot_be_met_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(MSCNNError, match=r"No threshold guarantees 1\.00% errors .* probability 95% on these 2,500"):
        mscnn.threshold_for_risk(rng.random(2500), rng.random(2500) < 0.9, 0.01)


@pytest.mark.parametrize(
    ("delta", "probability", "risk", "told"),
    [(0.05, "95%", 0.01, "1.00%"), (0.0125, "98.75%", 0.005, "0.50%"), (1e-5, "99.99%", 0.00504, "0.51%"),
     (0.1, "90%", 0.1, "10.00%"), (0.001, "99.9%", 0.3, "30.00%")],
)  # fmt: skip
def test_a_certificate_promises_no_more_by_rounding(delta, probability, risk, told):
    text = mscnn.Certificate(0.5, risk, delta, risk, 0, 100, 200).text()
    assert text.startswith(f"Guaranteed with probability {probability}: at threshold 0.5000 at most {told} of the")


def test_where_a_bound_cannot_be_met_the_smallest_one_that_can_is_named():
    rng = np.random.default_rng(1)
    confidence, correct = rng.random(600), rng.random(600) < 0.9
    steps, _ = check_certification_size(600, 0.02)
    order = np.argsort(-confidence)
    bounds = [risk_upper_bound(int((~correct[order[:n]]).sum()), n, 0.05 / steps) for n in range(1, 601)]
    with pytest.raises(MSCNNError, match=f"ask for a larger risk, from about {min(bounds):.2%} on"):
        mscnn.threshold_for_risk(confidence, correct, 0.02)


@pytest.mark.parametrize(("risk", "delta", "named"), [(0, 0.05, "risk is 0"), (1, 0.05, "risk"), (0.1, 1, "delta")])
def test_a_certificate_for_nonsense_is_refused(risk, delta, named):
    with pytest.raises(MSCNNError, match=f"{named}.*between 0 and 1"):
        mscnn.threshold_for_risk(*sorted_images((250, True)), risk, delta)


@pytest.mark.parametrize("tenths", [(9, 6, 1), (6, 9, 1)])  # the second: accepting more lowers the error rate first
def test_a_certificate_fails_no_more_often_than_delta_by_enumeration(tenths):
    """All samples of 9 images of three kinds: confidence and chance of being right are known for each."""
    kinds = tuple((confidence, Fraction(p, 10)) for confidence, p in zip((0.9, 0.6, 0.3), tenths, strict=True))
    risk, delta, share = 0.45, 0.3, Fraction(1, 3)
    failing = total = Fraction(0)
    for counts in itertools.product(range(10), repeat=6):  # right and incorrect images of each kind
        if sum(counts) != 9:
            continue
        chance = Fraction(factorial(9))
        for (_, p), good, bad in zip(kinds, counts[0::2], counts[1::2], strict=True):
            chance *= (share * p) ** good * (share * (1 - p)) ** bad / (factorial(good) * factorial(bad))
        total += chance
        confidence = np.repeat([c for c, _ in kinds for _ in range(2)], counts)
        correct = np.repeat([True, False] * 3, counts)
        try:
            threshold = mscnn.threshold_for_risk(confidence, correct, risk, delta).threshold
        except MSCNNError:
            continue
        taken = [p for c, p in kinds if c >= threshold]
        if 1 - sum(taken) / len(taken) > risk:
            failing += chance
    assert total == 1
    assert 0 < failing <= delta


@pytest.mark.parametrize("steepness", [2.0, 6.0])
def test_a_certificate_fails_no_more_often_than_delta_by_simulation(steepness):
    """2,000 samples of 400 images whose error rate falls smoothly with the confidence."""
    rng, risk, delta, failing, given = np.random.default_rng(0), 0.1, 0.1, 0, 0
    grid = (np.arange(100_000) + 0.5) / 100_000
    error_rate = (1 - grid) ** steepness / 2
    true_risk = np.cumsum(error_rate[::-1]) / np.arange(1, len(grid) + 1)  # of accepting the most confident
    for _ in range(2_000):
        confidence = rng.random(400)
        correct = rng.random(400) >= (1 - confidence) ** steepness / 2
        try:
            threshold = mscnn.threshold_for_risk(confidence, correct, risk, delta).threshold
        except MSCNNError:
            continue
        given += 1
        failing += true_risk[min(int((1 - threshold) * len(grid)), len(grid) - 1)] > risk
    assert failing <= delta * 2_000 and given > 1_500


@pytest.mark.parametrize(("coverage", "accepted"), [(1.0, 10), (0.7, 7), (0.65, 7), (0.01, 1)])
def test_a_threshold_for_a_coverage_accepts_that_share(coverage, accepted):
    confidence = np.random.default_rng(0).permutation(10) / 10
    assert (confidence >= mscnn.threshold_for_coverage(confidence, coverage)).sum() == accepted


@pytest.mark.parametrize("coverage", [0, 1.1, np.nan, "a", None, True])
def test_a_coverage_that_is_no_share_is_refused(coverage):
    with pytest.raises(MSCNNError, match=r"coverage is .*: it is a share, a number above 0 and up to 1"):
        mscnn.threshold_for_coverage(np.ones(3), coverage)


@pytest.mark.parametrize(("incorrect", "other"), [(10, 1), (2, 1), (1, 1), (1, 5)])
def test_a_threshold_for_costs_is_where_answering_begins_to_pay(incorrect, other):
    threshold = mscnn.threshold_for_costs(incorrect, other)
    for confidence in np.linspace(0, 1, 101):
        pays = incorrect * (1 - confidence) <= other + 1e-9
        assert (confidence >= threshold - 1e-9) == pays


@pytest.mark.parametrize("costs", [(0, 1), (1, 0), (-1, 1), ("2", 1), (np.inf, np.inf), (True, True)])
def test_costs_that_are_none_are_refused(costs):
    with pytest.raises(MSCNNError, match=r"the cost of .* has to be a number above 0"):
        mscnn.threshold_for_costs(*costs)


def test_thresholds_by_category_accept_the_same_share_of_each():
    rng = np.random.default_rng(0)
    category = rng.integers(0, 3, 3_000)
    confidence = rng.uniform(size=3_000) ** (1 + category)  # the later categories are harder
    own = mscnn.thresholds_by_category(category, confidence, 0.75, 4)
    assert own[0] > own[1] > own[2]
    assert own[3] == mscnn.threshold_for_coverage(confidence, 0.75), "the last category has no image"
    decided = mscnn.apply_threshold(category, confidence, own, 4)
    for c in range(3):
        here = category == c
        assert (decided[here] != 4).sum() == np.ceil(0.75 * here.sum())


# ------------------------------------------------------------------------------------------------------------
# Like nothing known
# ------------------------------------------------------------------------------------------------------------


def features_of(count: int, seed: int) -> dict[str, np.ndarray]:
    """What `ood_terms` needs of three categories; four correlated channels of texture, three of detail."""
    rng, labels = np.random.default_rng(seed), np.arange(count) % 3
    mixing = np.array([[1.0, 0.9, 0, 0], [0, 0.5, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 0]])  # the last is always 0
    found = {
        "logits": 3 * np.eye(3)[labels] + rng.normal(size=(count, 3)), "log_odds": rng.normal(4, 2, count),
        "block1_means": rng.normal(size=(count, 4)) @ mixing, "whitening_strength": rng.normal(size=(count, 3)),
    }  # fmt: skip
    return {name: one.astype(np.float32) for name, one in found.items()}


def statistics_of(count: int = 3000) -> OODStatistics:
    features = features_of(count, 0)
    statistics = fit_feature_statistics(features["block1_means"], features["whitening_strength"])
    return fit_ood_scale(statistics, ood_terms(**features_of(count, 1), statistics=statistics))


def score_of(features: dict[str, np.ndarray], statistics: OODStatistics) -> np.ndarray:
    return mscnn.ood_score(ood_terms(**features, statistics=statistics), statistics)


def test_a_hundredth_of_the_calibration_images_is_out_of_distribution():
    statistics = statistics_of()
    assert (score_of(features_of(3000, 1), statistics) > 0).sum() == 30, "beyond one of the three limits, not each"
    assert (score_of(features_of(20_000, 2), statistics) > 0).mean() == pytest.approx(0.01, abs=0.004)


AGAINST = np.where(np.arange(4) == 1, 9.0, 0.0) - np.where(np.arange(4) == 0, 9.0, 0.0)  # usual one by one


@pytest.mark.parametrize(
    ("column", "name", "change"),
    [(0, "logits", -20), (1, "log_odds", -30), (2, "block1_means", np.float32(AGAINST)), (3, "whitening_strength", -9)],
)
def test_each_of_the_four_terms_can_reject_an_image(column, name, change):
    statistics, usual = statistics_of(), features_of(500, 3)
    foreign = {**usual, name: usual[name] + change}
    before, after = (ood_terms(**features, statistics=statistics) for features in (usual, foreign))
    others = [k for k in range(4) if k != column]
    np.testing.assert_array_equal(after[:, others], before[:, others])
    assert (after[:, column] > before[:, column]).mean() > 0.99
    assert (score_of(foreign, statistics) > 0).mean() > 0.95


def test_usual_block1_means_do_not_excuse_a_doubt():
    """An image at the mean of all textures, whose distance is next to nothing, is as foreign as one at the usual."""
    statistics, features = statistics_of(), features_of(500, 3)
    terms = ood_terms(**features, statistics=statistics)
    terms[:, 2] = statistics.scale[0, 2]
    calm = np.where([False, False, True, False], -100.0, terms)
    np.testing.assert_array_equal(mscnn.ood_score(calm, statistics), mscnn.ood_score(terms, statistics))


@pytest.mark.parametrize(("name", "change"), [("block1_means", np.float32(AGAINST)), ("whitening_strength", -9)])
def test_no_confidence_outvotes_a_term_beyond_its_own_threshold(name, change):
    """On noise a network may be more confident than on any image that it knows."""
    statistics, usual = statistics_of(), features_of(500, 3)
    certain = {**usual, "logits": 40 * usual["logits"], "log_odds": usual["log_odds"] + 100}
    assert not (score_of(certain, statistics) > 0).mean() > 0.02
    assert (score_of({**certain, name: usual[name] + change}, statistics) > 0).all()


def test_within_the_limits_the_order_is_that_of_the_sum():
    statistics, features = statistics_of(), features_of(2000, 4)
    terms = ood_terms(**features, statistics=statistics)
    energy, doubt, block1_means, whitening_strength = ((terms - statistics.scale[0]) / statistics.scale[1]).T
    within = (block1_means <= statistics.thresholds[1]) & (whitening_strength <= statistics.thresholds[2])
    expected = energy + doubt + np.maximum(0, block1_means) - statistics.thresholds[0]
    np.testing.assert_allclose(mscnn.ood_score(terms, statistics)[within], expected[within])


@pytest.mark.parametrize("count", [1, 2, 8, 22, 90, 250, 999])
def test_few_calibration_images_lose_at_most_one_and_the_next_ones_few(count):
    features, lost = statistics_of(), []
    for seed in range(30):
        terms = ood_terms(**features_of(count, 100 + seed), statistics=features)
        statistics = fit_ood_scale(features, terms)
        assert (mscnn.ood_score(terms, statistics) > 0).sum() <= 1
        lost.append((score_of(features_of(500, 200 + seed), statistics) > 0).mean())
    assert count < 8 or np.mean(lost) < 0.03


def test_the_block1_term_is_a_mahalanobis_distance():
    from scipy.spatial.distance import mahalanobis

    statistics, features = statistics_of(), features_of(20, 4)
    expected = [
        2 * np.log(mahalanobis(one, statistics.block1_mean, statistics.block1_precision))
        for one in features["block1_means"]
    ]
    np.testing.assert_allclose(ood_terms(**features, statistics=statistics)[:, 2], expected, rtol=1e-4)
    covariance = np.cov(features_of(3000, 0)["block1_means"][:, :3].T)
    np.testing.assert_allclose(statistics.block1_precision[:3, :3], np.linalg.inv(covariance), rtol=0.05, atol=0.05)


def test_without_statistics_nothing_is_rejected():
    blank = OODStatistics(*(np.full_like(one, np.nan) for one in statistics_of(30)))
    foreign = score_of(features_of(5, 0), blank)
    assert np.isnan(foreign).all() and not (foreign > 0).any()


def test_cross_fitting_scores_each_half_by_the_other():
    rng = np.random.default_rng(0)
    stage1, stage2 = rng.normal(size=(2, 400))
    correct = rng.random(400) < 1 / (1 + np.exp(-stage1 - stage2))
    odds = mscnn.cross_fitted(stage1, stage2, correct)
    first = np.random.default_rng(0).permutation(400)[:200]
    rest = np.setdiff1d(np.arange(400), first)
    row = mscnn.fit_shared_calibration(stage1[rest], stage2[rest], correct[rest])
    np.testing.assert_allclose(odds[first], row[0] + row[1] * stage1[first] + row[2] * stage2[first], rtol=1e-5)
    flipped = correct.copy()
    flipped[first[0]] ^= True
    assert mscnn.cross_fitted(stage1, stage2, flipped)[first[0]] == odds[first[0]], "no image is scored by its own fit"
