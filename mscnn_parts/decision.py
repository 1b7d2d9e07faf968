"""From what both stages say to a decision: log-odds, calibrated confidence, threshold (NumPy in, NumPy out)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

ACCEPTED, LOW_CONFIDENCE, OUT_OF_DISTRIBUTION = "accepted", "low confidence", "out of distribution"
# Calibration coefficients: intercept, weight of Stage 1's margin, weight of Stage 2's log-odds.
PRIOR_MEAN = np.array([0.0, 0.5, 0.5])
SHARED_PRECISION = np.array([0.1, 1.0, 1.0])  # of the shared coefficients around PRIOR_MEAN: 1 / variance
CATEGORY_PRECISION = np.array([4.0, 32.0, 32.0])  # of a category's coefficients around the shared ones: 1 / variance


def log_odds(logits: np.ndarray, category: np.ndarray) -> np.ndarray:
    """log p(c) - log sum of the others' p, in float64, where a softmax in float32 would round to 1.

    Args:
        logits: (B, C).
        category: the category c of each row, (B,).

    Returns:
        float64 (B,).
    """
    chosen, others = _chosen_and_others(logits, category)
    return chosen - np.logaddexp.reduce(others, axis=1)  # SciPy's logsumexp takes 0.1 ms for a single image


def margin(logits: np.ndarray, category: np.ndarray) -> np.ndarray:
    """log p(c) - log p(the likeliest other): how far ahead of the next category a category is.

    After label smoothing the softmax ranks correct answers above incorrect ones less well (Xia et al. 2024,
    arXiv:2403.14715). The margin, which leaves out all but the next category, is hurt less.

    Args:
        logits: (B, C).
        category: the category c of each row, (B,).

    Returns:
        float64 (B,).
    """
    chosen, others = _chosen_and_others(logits, category)
    return chosen - others.max(axis=1)


def _chosen_and_others(logits: np.ndarray, category: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The logits of the categories, float64 (B,), and a copy of all, (B, C), in which they are -inf."""
    others, rows = np.array(logits, np.float64), np.arange(len(logits))
    chosen = others[rows, category]
    others[rows, category] = -np.inf
    return chosen, others


def fit_calibration(
    stage1: np.ndarray, stage2: np.ndarray, correct: np.ndarray, towards: np.ndarray, strength: np.ndarray
) -> np.ndarray:
    """Logistic regression of 'Stage 1 is correct' on what both stages say, shrunk towards given coefficients.

    The weights are kept from falling below 0: more evidence never lowers the confidence. Without images they are
    `towards` itself. (Platt 1999, with a Gaussian prior.)

    Args:
        stage1: Stage 1's margin, (N,). stage2: Stage 2's log-odds, (N,). correct: bool (N,).
        towards, strength: mean and 1 / variance of the prior of (intercept, weight 1, weight 2), (3,).

    Returns:
        float64 (3,).
    """
    from scipy.optimize import minimize
    from scipy.special import expit

    features = np.column_stack([np.ones(len(stage1)), stage1, stage2]).astype(np.float64)  # (N, 3)
    sign = np.where(correct, 1.0, -1.0)  # (N,)

    def loss(row):
        margin, pull = sign * (features @ row), row - towards
        gradient = -features.T @ (sign * expit(-margin)) + strength * pull
        return np.logaddexp(0, -margin).sum() + 0.5 * (strength * pull**2).sum(), gradient

    return minimize(loss, towards, jac=True, method="L-BFGS-B", bounds=[(None, None), (0, None), (0, None)]).x


def fit_shared_calibration(stage1: np.ndarray, stage2: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """The calibration coefficients of all categories, float64 (3,); see `fit_calibration`."""
    return fit_calibration(stage1, stage2, correct, PRIOR_MEAN, SHARED_PRECISION)


def fit_category_calibration(
    category: np.ndarray,
    stage1: np.ndarray,
    stage2: np.ndarray,
    correct: np.ndarray,
    common: np.ndarray,
    chosen: Iterable[int],
) -> np.ndarray:
    """The calibration coefficients of the chosen categories, float64 (len(chosen), 3), each shrunk towards
    the shared ones.

    Args:
        category: Stage 1's answer, (N,). stage1, stage2, correct: see `fit_calibration`, (N,). common: (3,).
    """
    groups = [category == c for c in chosen]
    return np.array([fit_calibration(stage1[g], stage2[g], correct[g], common, CATEGORY_PRECISION) for g in groups])


def halves(count: int, seed: int = 0) -> list[np.ndarray]:
    """The indices of two random halves of so many images."""
    return np.array_split(np.random.default_rng(seed).permutation(count), 2)


def cross_fitted(stage1: np.ndarray, stage2: np.ndarray, correct: np.ndarray, seed: int = 0) -> np.ndarray:
    """Log-odds that Stage 1 is correct, by shared coefficients: each half of the images uses the other half's fit.

    So a score can be measured on the images that it was fitted on. Rank within each of the `halves`, whose odds are of
    one fit.

    Args:
        stage1, stage2, correct: see `fit_calibration`, (N,). seed: of the halves.

    Returns:
        float64 (N,).
    """
    (first, second), odds = halves(len(correct), seed), np.zeros(len(correct))
    for fitted, scored in ((first, second), (second, first)):
        intercept, weight1, weight2 = fit_shared_calibration(stage1[fitted], stage2[fitted], correct[fitted])
        odds[scored] = intercept + weight1 * stage1[scored] + weight2 * stage2[scored]
    return odds


def confidence_log_odds(
    coefficients: np.ndarray, category: np.ndarray, stage1: np.ndarray, stage2: np.ndarray
) -> np.ndarray:
    """Log-odds that Stage 1 is correct, float64 (B,), by calibration coefficients (C, 3).

    Their sigmoid is the confidence.

    Args:
        stage1: Stage 1's margin, (B,). stage2: Stage 2's log-odds, (B,).
    """
    intercept, weight1, weight2 = coefficients[category].T  # (B,) each
    return intercept + weight1 * stage1 + weight2 * stage2


def apply_threshold(
    category: np.ndarray, confidence: np.ndarray, threshold: float | np.ndarray, other: int
) -> np.ndarray:
    """The decision by confidence: the category where it reaches the threshold, else `other`; (B,).

    Args:
        threshold: one for all, or one per category, (C,). other: C.
    """
    return np.where(confidence >= np.broadcast_to(threshold, other)[category], category, other)


class Stage1Outputs(NamedTuple):
    """What Stage 1 makes of B images: its logits on each view, and the means over the views of what it sees first."""

    logits: np.ndarray  # float32 (views, B, C)
    block1_means: np.ndarray  # float32 (B, T), the mean of each channel of its first block
    whitening_strength: np.ndarray  # float32 (B, D), the log of the mean strength of each whitening filter


class StageScores(NamedTuple):
    """What both stages say of B images; every field has B rows."""

    category: np.ndarray  # int 0..C-1: Stage 1's answer, by its mean logits
    stage1: np.ndarray  # float64, Stage 1's margin for it
    stage2: np.ndarray  # float64, the log-odds of it by its Stage 2 CNN
    logits: np.ndarray  # float32 (views, B, C), Stage 1's on each view
    block1_means: np.ndarray  # float32 (B, T), what its first block sees
    whitening_strength: np.ndarray  # float32 (B, D), what its whitening sees

    @property
    def mean_logits(self) -> np.ndarray:
        """Stage 1's over the views, float32 (B, C)."""
        return self.logits.mean(axis=0)


class Decisions(NamedTuple):
    """What `MultiStageCNN.decide` says of B images; every field has B rows."""

    category: np.ndarray  # int 0..C, C meaning OTHER
    stage1_category: np.ndarray  # int 0..C-1, by Stage 1's mean logits over the views
    stage1_confidence: np.ndarray  # softmax probability of stage1_category, by the same
    stage2_confidence: np.ndarray  # Stage 2's own probability that Stage 1 is correct
    confidence: np.ndarray  # both combined and calibrated: what the threshold is held against
    stage1_log_odds: np.ndarray  # float64, the same as stage1_confidence before the sigmoid
    stage1_margin: np.ndarray  # float64, its lead over the next category, by the same: goes into the confidence
    stage2_log_odds: np.ndarray  # float64, the same as stage2_confidence before the sigmoid
    stage1_logits: np.ndarray  # (B, C), the mean over the views
    single_view_logits: np.ndarray  # (B, C), of the image alone: what Stage 1 would say without its mirror image
    ood_score: np.ndarray  # float64, above 0: OTHER at any threshold; NaN in a model without OOD statistics

    @property
    def in_distribution(self) -> np.ndarray:
        """Where the threshold decides, bool (B,); all other images are OTHER at any threshold."""
        return ~(self.ood_score > 0)  # True where it is NaN

    def take(self, indices: np.ndarray) -> Decisions:
        """The decisions on some of the images."""
        return Decisions(*(values[indices] for values in self))

    def reasons(self) -> np.ndarray:
        """Why each image was decided as it was: ACCEPTED, LOW_CONFIDENCE or OUT_OF_DISTRIBUTION; str (B,)."""
        accepted = self.category < self.stage1_logits.shape[1]
        return np.where(accepted, ACCEPTED, np.where(self.in_distribution, LOW_CONFIDENCE, OUT_OF_DISTRIBUTION))


def decide_on(
    scores: StageScores, log_odds_of_confidence: np.ndarray, ood: np.ndarray, threshold: float | np.ndarray
) -> Decisions:
    """The decisions by both stages' scores.

    Args:
        log_odds_of_confidence: see `confidence_log_odds`, (B,). ood: OOD score, (B,); above 0 the decision is OTHER.
        threshold: one for all, or one per category, (C,).
    """
    from scipy.special import expit

    count, confidence = scores.mean_logits.shape[1], expit(log_odds_of_confidence)
    odds = log_odds(scores.mean_logits, scores.category)
    return Decisions(
        category=np.where(ood > 0, count, apply_threshold(scores.category, confidence, threshold, count)),
        stage1_category=scores.category,
        stage1_confidence=expit(odds),
        stage2_confidence=expit(scores.stage2),
        confidence=confidence,
        stage1_log_odds=odds,
        stage1_margin=scores.stage1,
        stage2_log_odds=scores.stage2,
        stage1_logits=scores.mean_logits,
        single_view_logits=scores.logits[0],
        ood_score=ood,
    )
