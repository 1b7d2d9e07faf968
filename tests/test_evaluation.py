"""Reports and selective metrics, against values worked by hand and plainer implementations."""

import itertools

import numpy as np
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import mscnn_helpers as mscnn
from mscnn_helpers import OTHER
from mscnn_parts import metrics
from mscnn_parts.metrics import (
    augrc,
    calibration_error,
    coverage_at_risk,
    e_aurc,
    paired_difference,
    risk_at_coverage,
    selective_metrics,
)
from mscnn_parts.sources import CIFAR10_NAMES


def decisions_of(category, stage1_category, confidence=None, log_odds=None, categories: int = 10) -> mscnn.Decisions:
    """Decisions with only the given fields meaningful."""
    category, stage1_category = np.asarray(category, int), np.asarray(stage1_category, int)
    blank = np.full(len(category), np.nan)
    confidence, log_odds = (blank if one is None else np.asarray(one, float) for one in (confidence, log_odds))
    logits = np.zeros((len(category), categories), np.float32)
    return mscnn.Decisions(
        category, stage1_category, blank, blank, confidence, log_odds, blank, blank, logits, logits, blank
    )


# ------------------------------------------------------------------------------------------------------------
# Risk-coverage
# ------------------------------------------------------------------------------------------------------------


def risk_by_every_order(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """The mean of the curves over all orders of the images that do not contradict the confidences."""
    curves = [
        np.cumsum([not correct[i] for i in order]) / np.arange(1, len(order) + 1)
        for order in itertools.permutations(range(len(correct)))
        if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean(curves, axis=0)


def test_risk_coverage_by_hand():
    coverage, risk = mscnn.risk_coverage(np.array([0.7, 0.9, 0.8, 0.1]), np.array([True, True, False, False]))
    np.testing.assert_allclose(coverage, [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 1 / 2, 1 / 3, 2 / 4])


def test_risk_coverage_with_ties_by_hand():
    """Three images share the highest confidence, one of them wrong: each counts with a third of an error."""
    confidence, correct = np.array([0.9, 0.9, 0.9, 0.2]), np.array([False, True, True, False])
    np.testing.assert_allclose(mscnn.risk_coverage(confidence, correct)[1], [1 / 3, 1 / 3, 1 / 3, 2 / 4])
    assert mscnn.aurc(confidence, correct) == pytest.approx((1 + 1 / 2) / 4)


@pytest.mark.parametrize("levels", [2, 3, 7])
def test_risk_coverage_is_the_mean_over_the_orders_of_ties(levels):
    rng = np.random.default_rng(levels)
    confidence, correct = rng.integers(0, levels, 7) / levels, rng.random(7) < 0.6
    risk = mscnn.risk_coverage(confidence, correct)[1]
    np.testing.assert_allclose(risk, risk_by_every_order(confidence, correct))
    assert mscnn.aurc(confidence, correct) == pytest.approx(risk_by_every_order(confidence, correct).mean())


def test_aurc_does_not_depend_on_the_order_of_the_images():
    rng = np.random.default_rng(0)
    confidence = np.round(rng.random(500), 1)  # eleven values: many ties
    correct = rng.random(500) < confidence
    values = {round(mscnn.aurc(confidence[order], correct[order]), 12) for order in map(rng.permutation, [500] * 20)}
    assert len(values) == 1
    best, worst = np.lexsort((~correct, -confidence)), np.lexsort((correct, -confidence))
    assert mscnn.aurc(confidence[best], correct[best]) == pytest.approx(mscnn.aurc(confidence[worst], correct[worst]))


def test_aurc_depends_on_the_ranks_only():
    rng = np.random.default_rng(1)
    log_odds, correct = rng.normal(3, 2, 200), rng.random(200) < 0.8
    assert mscnn.aurc(log_odds, correct) == mscnn.aurc(expit(log_odds), correct)


def test_aurc_at_its_ends():
    confidence = np.linspace(0, 1, 100)
    assert mscnn.aurc(confidence, np.ones(100, bool)) == 0
    assert mscnn.aurc(confidence, np.zeros(100, bool)) == 1
    half = np.arange(100) >= 50
    assert mscnn.aurc(confidence, half) == pytest.approx(np.sum([(k - 50) / k for k in range(51, 101)]) / 100)
    assert mscnn.aurc(np.zeros(100), half) == pytest.approx(0.5)  # a confidence that says nothing: the error rate


# ------------------------------------------------------------------------------------------------------------
# Failure prediction
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [1, 6])
def test_failure_metrics_against_scikit_learn_and_pair_by_pair(decimals):
    rng = np.random.default_rng(2)
    correct = rng.random(300) < 0.8
    confidence = np.round(expit(rng.normal(np.where(correct, 2, 0), 1.5)), decimals)
    got = mscnn.failure_metrics(confidence, correct)
    wins = np.sign(confidence[correct][:, None] - confidence[~correct][None, :])  # a tie counts half
    assert got["auroc_failure"] == pytest.approx((wins.mean() + 1) / 2)
    assert got["auroc_failure"] == pytest.approx(roc_auc_score(correct, confidence))
    highest = max(t for t in confidence if (confidence[correct] >= t).mean() >= 0.95)
    assert got["fpr95"] == pytest.approx((confidence[~correct] >= highest).mean())
    assert got["aurc"] == mscnn.aurc(confidence, correct)


def test_fpr95_by_hand():
    """20 correct images: the threshold that accepts 19 of them lies at 0.20, where 2 of 4 incorrect ones pass."""
    confidence = np.array([*np.linspace(0.2, 0.9, 19), 0.05, 0.95, 0.2, 0.19, 0.01])
    correct = np.arange(24) < 20
    assert mscnn.failure_metrics(confidence, correct)["fpr95"] == 0.5
    assert mscnn.failure_metrics(np.zeros(24), correct)["fpr95"] == 1  # all alike: accept all or nothing
    assert mscnn.failure_metrics(correct.astype(float), correct)["fpr95"] == 0


@pytest.mark.parametrize(("correct", "aurc"), [(True, 0.0), (False, 1.0)])
def test_failure_cannot_be_predicted_where_there_is_but_one_kind(correct, aurc):
    got = mscnn.failure_metrics(np.linspace(0, 1, 10), np.full(10, correct))
    assert got["aurc"] == aurc
    assert np.isnan(got["auroc_failure"]) and np.isnan(got["fpr95"])


def noisy(levels: int) -> tuple[np.ndarray, np.ndarray]:
    """200 images with confidences of few or many levels, mostly right where they are high."""
    rng = np.random.default_rng(levels)
    confidence = rng.integers(0, levels + 1, 200) / levels
    return confidence, rng.random(200) < 0.5 + confidence / 2


@pytest.mark.parametrize("levels", [1, 4, 10_000])
def test_augrc_is_its_closed_form_of_auroc_and_accuracy(levels):
    confidence, correct = noisy(levels)
    a = correct.mean()
    closed = (1 - roc_auc_score(correct, confidence)) * a * (1 - a) + (1 - a) ** 2 / 2
    assert augrc(confidence, correct) == pytest.approx(closed, rel=1e-12)


def test_augrc_by_hand():
    """Right, wrong, right, wrong by falling confidence: 0, 1, 1, 2 errors of 4 images."""
    confidence, correct = np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, False])
    heights = [0, 0, 1 / 4, 1 / 4, 2 / 4]
    area = sum((a + b) / 2 / 4 for a, b in itertools.pairwise(heights))
    assert augrc(confidence, correct) == pytest.approx(area)


def test_e_aurc_is_0_for_a_confidence_that_knows_and_grows_with_what_it_does_not():
    correct = np.array([True, False, True, True, False])
    assert e_aurc(correct + 0.0, correct) == 0
    swapped = np.array([1.0, 1.0, 1.0, 0.0, 0.0])  # the fourth, right, behind the second, wrong
    optimum = (0 + 0 + 0 + 1 / 4 + 2 / 5) / 5
    assert e_aurc(swapped, correct) == pytest.approx(mscnn.aurc(swapped, correct) - optimum)
    assert e_aurc(swapped, correct) > 0.1


MEASURES = {
    "threshold_for_risk": lambda *pair: mscnn.threshold_for_risk(*pair, 0.9),
    "risk_at_coverage": lambda *pair: risk_at_coverage(*pair, 0.5),
    "coverage_at_risk": lambda *pair: coverage_at_risk(*pair, 0.5),
    "calibration_error, equal mass": lambda *pair: calibration_error(*pair, equal_mass=True),
    **{name: getattr(metrics, name) for name in (
        "risk_coverage", "aurc", "e_aurc", "augrc", "failure_metrics", "reliability",
        "calibration_error",
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
def test_what_is_no_confidence_or_not_whether_right_is_refused(name):
    measure, correct = MEASURES[name], np.arange(20) % 4 > 0
    confidence = np.linspace(0, 1, 20)
    measure(list(confidence), list(correct))
    for labels in (correct.astype(int), correct + 0.0, np.arange(20)):
        with pytest.raises(mscnn.MSCNNError, match=r"correct is (int|float)\d+, not bool: .* labels == predicted"):
            measure(confidence, labels)
    with pytest.raises(mscnn.MSCNNError, match=r"confidence is \(20,\) and correct \(19,\)"):
        measure(confidence, correct[1:])
    with pytest.raises(mscnn.MSCNNError, match="3 of 20 confidences are NaN"):
        measure(np.where(np.arange(20) < 3, np.nan, confidence), correct)


@pytest.mark.parametrize("name", ["reliability", "calibration_error", "calibration_error, equal mass"])
def test_log_odds_are_no_share(name):
    with pytest.raises(mscnn.MSCNNError, match=r"between -3 and 3: use 0 to 1"):
        MEASURES[name](np.array([-3.0, 0.5, 3.0]), np.array([False, True, True]))


@pytest.mark.parametrize("name", ["augrc", "risk_at_coverage"])
def test_nothing_is_measured_without_an_image(name):
    with pytest.raises(mscnn.MSCNNError, match="empty"):
        MEASURES[name](np.zeros(0), np.zeros(0, bool))


def test_errors_and_coverages_against_a_loop_over_thresholds():
    confidence, correct = noisy(10_000_000)
    taken = [confidence >= threshold for threshold in sorted(confidence, reverse=True)]
    points = [(one.mean(), 1 - correct[one].mean()) for one in taken]  # coverage and risk, without ties
    for wanted in (0.005, 0.3, 0.7, 1.0):
        first = next(risk for covered, risk in points if covered >= wanted - 1e-12)
        assert risk_at_coverage(confidence, correct, wanted) == pytest.approx(first)
    for allowed in (0.0, 0.101, 0.201, 1.0):
        fits = [covered for covered, risk in points if risk <= allowed]
        assert coverage_at_risk(confidence, correct, allowed) == pytest.approx(max(fits, default=0))


@pytest.mark.parametrize(("count", "wrong"), [(9, 1), (49, 13), (5, 2)])
def test_images_of_equal_confidence_are_covered_up_to_their_own_error_rate(count, wrong):
    correct = np.arange(count) >= wrong
    assert coverage_at_risk(np.ones(count), correct, wrong / count) == 1


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, bool])
def test_any_numbers_are_ranked_alike(dtype):
    correct = np.array([False, True, True])
    assert mscnn.aurc(np.array([0, 1, 1], dtype), correct) == mscnn.aurc(np.array([0.0, 1, 1]), correct)


def test_ties_are_what_a_random_order_of_them_gives_in_the_mean():
    confidence, correct = noisy(4)
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(2_000):
        order = np.lexsort((rng.random(len(confidence)), -confidence))
        errors.append((~correct[order])[: len(order) // 3].mean())
    assert risk_at_coverage(confidence, correct, (len(correct) // 3) / len(correct)) == pytest.approx(
        np.mean(errors), abs=0.005
    )


# ------------------------------------------------------------------------------------------------------------
# Selective metrics and metrics.json
# ------------------------------------------------------------------------------------------------------------


def test_selective_metrics_by_hand():
    #          accepted: right right wrong | rejected: right wrong wrong wrong wrong
    decided = [0, 1, 2, 10, 10, 10, 10, 10]
    stage1, labels = [0, 1, 2, 3, 4, 5, 6, 7], np.array([0, 1, 9, 3, 9, 9, 9, 9])
    assert selective_metrics(decisions_of(decided, stage1), labels) == {
        "coverage": 3 / 8,
        "selective_accuracy": pytest.approx(2 / 3),
        "accuracy_other_wrong": 2 / 8,
        "stage_report_accuracy": 6 / 8,
    }


def test_category_metrics_by_hand():
    decided, stage1 = [0, 0, 10, 1, 10, 0], [0, 0, 0, 1, 1, 0]
    got = mscnn.category_metrics(decisions_of(decided, stage1), np.array([0, 0, 0, 1, 0, 1]), ("ant", "bee", "cow"))
    assert got["ant"] == {
        "images": 4, "accuracy": 3 / 4, "coverage": 2 / 4, "selective_accuracy": 1.0, "precision": pytest.approx(2 / 3),
    }  # fmt: skip
    assert got["bee"] == {"images": 2, "accuracy": 0.5, "coverage": 1.0, "selective_accuracy": 0.5, "precision": 1.0}
    assert got["cow"]["images"] == 0 and np.isnan([v for k, v in got["cow"].items() if k != "images"]).all()


SIX, FIVE = np.zeros(6, int), np.zeros(5, int)


@pytest.mark.parametrize(
    "measure",
    [
        lambda: selective_metrics(decisions_of(SIX, SIX), FIVE),
        lambda: mscnn.category_metrics(decisions_of(SIX, SIX), FIVE, ("ant", "bee")),
        lambda: mscnn.evaluate(decisions_of(SIX, SIX), FIVE, 0.7),
        lambda: mscnn.stage_report_labels(decisions_of(SIX, SIX), FIVE, 10),
        lambda: mscnn.compare_decisions(decisions_of(SIX, SIX), decisions_of(FIVE, FIVE), SIX, ("ant", "bee")),
        lambda: paired_difference(SIX == 0, FIVE == 0),
        lambda: mscnn.thresholds_by_category(SIX, FIVE / 2, 0.5, 3),
        lambda: mscnn.log_loss_by_category(SIX, FIVE / 2, FIVE == 0, 3),
        lambda: mscnn.threshold_for_coverage(np.zeros((5, 1)), 0.5),
        lambda: mscnn.plot_thresholds(SIX / 2, FIVE == 0, [0.5], 0.5, "test"),
        lambda: mscnn.plot_gallery(np.zeros((6, 8, 8, 3)), decisions_of(SIX, SIX, SIX / 2), FIVE, ("ant", "bee"), ""),
        lambda: mscnn.decision_confusion(SIX, FIVE, ("ant", "bee")),
        lambda: mscnn.decision_report(SIX, FIVE, ("ant", "bee")),
    ],
)
def test_arrays_of_different_length_are_named(measure):
    with pytest.raises(mscnn.MSCNNError, match=r" is \([56],.*: give one of each an image, \(N,\)"):
        measure()


def test_what_is_no_truth_value_no_number_or_no_category_is_named():
    for incorrect, message in (
        (
            lambda: mscnn.evaluate(decisions_of(SIX, SIX), SIX / 1, 0.7),
            "labels are float64: give .* as integers from 0",
        ),
        (lambda: selective_metrics(decisions_of(SIX, SIX), np.array(["ant"] * 6)), "labels are <U3"),
        (lambda: risk_at_coverage(SIX / 2, SIX == 0, 2), "coverage is 2: it is a share, a number from 0 to 1"),
        (lambda: coverage_at_risk(SIX / 2, SIX == 0, "1"), "error is '1': it is a share, a number from 0 to 1"),
        (lambda: mscnn.threshold_for_risk(SIX / 2, SIX == 0, 1), "risk is 1: .* a number between 0 and 1"),
        (lambda: mscnn.reliability(SIX / 2, SIX == 0, 0), "bins is 0: it has to be a whole number from 1 on"),
        (lambda: calibration_error(SIX / 6, SIX == 0, 0, equal_mass=True), "bins is 0: it has to be a whole number"),
        (lambda: calibration_error(SIX[:0], SIX[:0] == 0, equal_mass=True), "empty: there is nothing to measure"),
        (lambda: mscnn.plot_confusion(np.eye(3), ("ant", "bee"), ""), r"The matrix is float64 \(3, 3\): use counts"),
        (lambda: mscnn.plot_confusion(np.eye(3, dtype=int), ("ant",), ""), r"The matrix is int64 \(3, 3\): .* 2 names"),
        (lambda: mscnn.plot_images(np.zeros((2, 8, 8, 3)), ["ant"]), "1 captions for 2 images"),
        (lambda: paired_difference(SIX, SIX), "first is int64 and second int64: .* as bool"),
        (lambda: mscnn.threshold_for_coverage(np.array([np.nan, 0.5]), 0.5), "1 of 2 confidences are NaN"),
        (lambda: mscnn.thresholds_by_category(SIX + 3, SIX / 2, 0.5, 3), "Categories are int64, 3 to 3: .* 0 to 2"),
        (
            lambda: mscnn.log_loss_by_category(SIX - 1, SIX / 2, SIX == 0, 3),
            "Categories are int64, -1 to -1: .* 0 to 2",
        ),
    ):
        with pytest.raises(mscnn.MSCNNError, match=message):
            incorrect()


def test_a_model_that_rejects_everything_is_not_praised_by_the_honest_figures():
    """The stage report alone would: it scores Stage 1's error rate, here 79 %."""
    labels = np.zeros(100, int)
    stage1 = np.where(np.arange(100) < 21, 0, 1)
    got = selective_metrics(decisions_of(np.full(100, 10), stage1), labels)
    assert got["coverage"] == got["accuracy_other_wrong"] == 0
    assert np.isnan(got["selective_accuracy"])
    assert got["stage_report_accuracy"] == 0.79


def test_a_model_that_accepts_everything_is_stage_1():
    labels = np.array([0, 1, 2, 3])
    got = selective_metrics(decisions_of([0, 1, 2, 9], [0, 1, 2, 9]), labels)
    assert got == dict.fromkeys(got, 0.75) | {"coverage": 1.0}


def test_other_has_two_reasons():
    decisions = decisions_of([3, 10, 10, 10], [3, 3, 4, 5])._replace(ood_score=np.array([-1.0, -1.0, 2.0, np.nan]))
    assert decisions.reasons().tolist() == [
        mscnn.ACCEPTED,
        mscnn.LOW_CONFIDENCE,
        mscnn.OUT_OF_DISTRIBUTION,
        mscnn.LOW_CONFIDENCE,
    ]


@pytest.mark.parametrize("shape", [(6, 32, 32, 3), (5, 30, 33, 1)])
def test_made_up_images_show_nothing(shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    made_up, again = mscnn.synthetic_ood_images(images, 1), mscnn.synthetic_ood_images(images, 1)
    for kind, one in made_up.items():
        assert one.dtype == np.uint8 and len(one) == len(images)
        np.testing.assert_array_equal(one, again[kind])
    assert (made_up["one color"] == made_up["one color"][:, :1, :1]).all()
    assert len(np.unique(made_up["one color"][:, 0, 0], axis=0)) == len(images), "another one for each image"
    assert (made_up["one color"][:3, 0, 0, 0] == [255, 0, 128]).all()
    assert len(mscnn.synthetic_ood_images(images[:1])["one color"]) == 1
    for i, line in enumerate(made_up["stripes"]):
        assert len(np.unique(line.reshape(-1, shape[-1]), axis=0)) == 2, "two colors"
        along = [line[:1] == line, line[:, :1] == line, line[1:, :-1] == line[:-1, 1:]][i % 3]
        assert along.all()
    height, width = shape[1] // 4 * 4, shape[2] // 4 * 4
    scrambled = made_up["scrambled"]
    assert scrambled.shape == shape
    np.testing.assert_array_equal(scrambled[:, height:], images[:, height:])
    np.testing.assert_array_equal(scrambled[:, :, width:], images[:, :, width:])

    def patches(image) -> list[bytes]:
        rows = [np.split(row, 4, axis=1) for row in np.split(image, 4, axis=0)]
        return [patch.tobytes() for row in rows for patch in row]

    for image, shuffled in zip(images[:, :height, :width], scrambled[:, :height, :width], strict=True):
        assert sorted(patches(image)) == sorted(patches(shuffled)) and patches(image) != patches(shuffled)


def test_evaluate_gives_the_entries_of_metrics_json():
    labels = np.array([0, 1, 2, 3, 4, 5])
    stage1 = [0, 1, 2, 3, 9, 9]
    decisions = decisions_of([0, 1, 2, 3, 10, 10], stage1, [0.9, 0.9, 0.8, 0.8, 0.1, 0.2])
    # On a single view Stage 1 errs once more, and its confidence grows with its errors; the combined one does not.
    one_look = np.arange(1, 7)[:, None] * np.eye(10)[[0, 1, 2, 9, 9, 9]]
    decisions = decisions._replace(single_view_logits=one_look, ood_score=np.array([-1.0, -0.5, 0, 0, 0.5, 2]))
    got = mscnn.evaluate(decisions, labels, threshold=0.55)
    assert got["two_stage"]["ood_rejection_rate"] == pytest.approx(2 / 6)
    older = mscnn.evaluate(decisions._replace(ood_score=np.full(6, np.nan)), labels, threshold=0.55)
    assert np.isnan(older["two_stage"]["ood_rejection_rate"]), "nobody has looked"
    assert set(got) == {"stage1", "two_stage"}
    assert set(got["stage1"]) == {"accuracy", "aurc", "auroc_failure", "fpr95"}
    assert set(got["two_stage"]) == {
        "threshold", "accuracy", "coverage", "selective_accuracy", "accuracy_other_wrong", "stage_report_accuracy",
        "ood_rejection_rate", "aurc", "auroc_failure", "fpr95",
    }  # fmt: skip
    assert got["stage1"]["accuracy"] == 3 / 6 and got["two_stage"]["accuracy"] == pytest.approx(4 / 6)
    assert (got["stage1"]["auroc_failure"], got["two_stage"]["auroc_failure"]) == (0, 1)
    assert (got["stage1"]["fpr95"], got["two_stage"]["fpr95"]) == (1, 0)
    assert got["two_stage"]["threshold"] == 0.55 and got["two_stage"]["selective_accuracy"] == 1


# ------------------------------------------------------------------------------------------------------------
# Reports
# ------------------------------------------------------------------------------------------------------------

NAMES = CIFAR10_NAMES


def test_stage_truth_is_other_where_stage_1_is_wrong():
    truth = mscnn.stage_report_labels(decisions_of([0, 10, 2], [0, 1, 2]), np.array([0, 1, 5]), other=10)
    np.testing.assert_array_equal(truth, [0, 1, 10])


def test_report_has_a_row_for_each_category_and_other():
    """Also where some of them do not occur, and with the shares worked by hand."""
    truth, decided = np.array([8, 8, 8, 10, 0]), np.array([8, 8, 10, 10, 8])
    lines = [line.split() for line in mscnn.decision_report(truth, decided, NAMES).splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 5}
    assert list(rows) == [*NAMES, OTHER]
    assert rows["ship"] == ["0.667", "0.667", "0.667", "3"]
    assert rows[OTHER] == ["0.500", "1.000", "0.667", "1"]
    assert rows["cat"] == ["0.000", "0.000", "0.000", "0"]


def test_confusion_counts_every_image_once():
    rng = np.random.default_rng(3)
    truth, decided = rng.integers(0, 10, 400), rng.integers(0, 11, 400)
    matrix = mscnn.decision_confusion(truth, decided, NAMES)
    assert matrix.shape == (11, 11) and np.issubdtype(matrix.dtype, np.integer)
    np.testing.assert_array_equal(matrix.sum(axis=1), np.bincount(truth, minlength=11))
    np.testing.assert_array_equal(matrix.sum(axis=0), np.bincount(decided, minlength=11))
    assert matrix[3, 10] == ((truth == 3) & (decided == 10)).sum()  # rows are the truth


# ------------------------------------------------------------------------------------------------------------
# Reliability
# ------------------------------------------------------------------------------------------------------------


def test_reliability_by_hand():
    confidence = np.array([0.0, 0.2, 0.6, 0.7, 1.0])
    correct = np.array([False, True, True, False, True])
    mean, accuracy, count = mscnn.reliability(confidence, correct, bins=4)
    np.testing.assert_array_equal(count, [2, 0, 2, 1])  # 1.0 belongs to the last bin
    np.testing.assert_allclose(mean, [0.1, np.nan, 0.65, 1.0])
    np.testing.assert_allclose(accuracy, [0.5, np.nan, 0.5, 1.0])
    assert calibration_error(confidence, correct, bins=4) == pytest.approx((2 * 0.4 + 2 * 0.15 + 0) / 5)


def test_calibration_error_is_small_for_honest_confidences_and_large_for_boasting():
    rng = np.random.default_rng(4)
    p = rng.random(50_000)
    correct = rng.random(len(p)) < p
    assert calibration_error(p, correct) < 0.01
    assert calibration_error(np.ones(len(p)), correct) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("levels", [1, 4, 10_000])
def test_calibration_error_in_bins_of_equal_mass_does_not_depend_on_the_order(levels):
    confidence, correct = noisy(levels)
    order = np.argsort(correct, kind="stable")
    errors = [calibration_error(confidence[o], correct[o], 15, equal_mass=True) for o in (order, order[::-1])]
    assert errors[0] == pytest.approx(errors[1])


def test_calibration_error_in_bins_of_equal_mass_by_hand():
    confidence, correct = np.array([0.9, 0.1, 0.2, 0.8]), np.array([True, False, True, True])
    # lower half: 0.15 on the average, half right; upper half: 0.85, all right
    assert calibration_error(confidence, correct, bins=2, equal_mass=True) == pytest.approx((0.35 + 0.15) / 2)
    assert calibration_error(confidence, correct, bins=9, equal_mass=True) == pytest.approx(
        np.abs(confidence - correct).mean()
    )


# ------------------------------------------------------------------------------------------------------------
# Comparing two models
# ------------------------------------------------------------------------------------------------------------


def test_a_paired_difference_by_hand():
    first = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], bool)
    second = np.array([1, 1, 0, 1, 1, 1, 0, 0, 0, 0], bool)  # three gained, one lost
    difference, low, high = paired_difference(first, second)
    assert difference == pytest.approx(0.2)
    middle, half = 2 / 12, 1.96 * np.sqrt((5 - 4 / 12) / 144)  # 3.5 and 1.5 of 12
    assert (low, high) == pytest.approx((middle - half, middle + half))


def test_a_paired_difference_has_a_sign_and_needs_no_images():
    first, second = np.random.default_rng(0).random((2, 40)) < 0.5
    there, back = paired_difference(first, second), paired_difference(second, first)
    assert there == pytest.approx((-back[0], -back[2], -back[1]))
    same = paired_difference(first, first)
    assert same[0] == 0 and same[1] == -same[2] < 0
    assert paired_difference(first[:0], second[:0])[0] == 0


def test_the_interval_of_a_paired_difference_covers_the_truth():
    """Of 2,000 made-up comparisons about 95 % of the intervals hold the true difference, 0.05."""
    rng, held = np.random.default_rng(1), []
    for _ in range(2000):
        kind = rng.choice(4, 200, p=[0.8, 0.08, 0.03, 0.09])  # both, second only, first only, none
        _, low, high = paired_difference((kind == 0) | (kind == 2), (kind == 0) | (kind == 1))
        held.append(low <= 0.05 <= high)
    assert 0.93 <= np.mean(held) <= 0.975


def test_models_are_compared_by_true_category():
    labels = np.array([0, 0, 0, 1, 1])
    first = decisions_of([0, 2, 1, 1, 2], [0, 0, 1, 1, 0], categories=2)
    second = decisions_of([0, 0, 2, 1, 0], [0, 0, 1, 1, 0], categories=2)
    cat, dog, everything = mscnn.compare_decisions(first, second, labels, ("cat", "dog"))
    assert (cat.category, cat.images, cat.changed) == ("cat", 3, 2)
    assert (cat.coverage[0], cat.errors[0]) == pytest.approx((0, -1 / 3))
    assert (dog.images, dog.changed) == (2, 1)
    assert (dog.coverage[0], dog.errors[0]) == pytest.approx((1 / 2, 1 / 2))
    assert (everything.category, everything.images, everything.changed) == ("all", 5, 3)
    assert (everything.coverage[0], everything.errors[0]) == pytest.approx((1 / 5, 0))
    accepted = [one.category < 2 for one in (first, second)]
    assert everything.coverage == paired_difference(*accepted)
