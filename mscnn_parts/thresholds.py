"""Thresholds for a guaranteed risk, a coverage, a category or costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mscnn_parts.checks import (
    check_categories_within,
    check_numbers,
    check_rate,
    check_share,
    checked_pair,
    one_per_image,
)
from mscnn_parts.settings import MSCNNError, check_threshold

if TYPE_CHECKING:
    from mscnn_parts.model import MultiStageCNN

USER_SET = "as given"  # how a threshold was chosen, if nothing else is told of it


class Certificate(NamedTuple):
    """A threshold and what is guaranteed of it: with probability 1 - delta the true error rate is at most `risk`."""

    threshold: float
    risk: float  # the error rate that was asked for, among the images that are accepted
    delta: float  # probability that the guarantee fails, over the draw of the split it was computed on
    bound: float  # upper bound of the error rate at the threshold, at most `risk`
    errors: int  # incorrect among the accepted images of that split
    accepted: int
    images: int  # size of the split

    def text(self) -> str:
        """What it promises, in one line; never more than it does by rounding."""
        return (
            f"Guaranteed with probability {_kept(self.delta)}: at threshold {self.threshold:.4f} at most "
            f"{_promised(self.risk)} of the accepted are incorrect. "
            f"Of {self.accepted:,} accepted images, {self.errors} were."
        )


def _promised(risk: float) -> str:
    """The risk that is guaranteed, rounded up."""
    return f"{math.ceil(1e4 * risk - 1e-6) / 1e4:.2%}"


def _kept(delta: float) -> str:
    """The probability that a guarantee holds, rounded down: 98.75 % is not told as 99 %."""
    return f"{math.floor(1e4 * (1 - delta) + 1e-6) / 100:g}%"


def risk_upper_bound(errors: int, accepted: int, delta: float) -> float:
    """Exact upper bound of an error rate, by the binomial distribution (Clopper & Pearson 1934).

    With an error rate above it, so few errors have a probability of less than `delta`. 1 where nothing is accepted.
    """
    from scipy.stats import beta

    return 1.0 if errors >= accepted else float(beta.ppf(1 - delta, errors + 1, accepted - errors))


def check_certification_size(images: int, risk: float, delta: float = 0.05) -> tuple[int, int]:
    """Whether so many images could guarantee the risk at all, if the model made no error on them.

    Returns:
        How many thresholds the search of `threshold_for_risk` may try; the least number of accepted images it needs.

    Raises:
        MSCNNError: they could not, or a value is outside its range.
    """
    for name, value in (("risk", risk), ("delta", delta)):
        check_share(name, value, zero=False, one=False)
    steps = max(1, int(np.ceil(np.log2(max(images, 1)))))
    needed = int(np.ceil(np.log(delta / steps) / np.log1p(-risk)))  # without an error, the bound is `risk` here
    if images < needed:
        raise MSCNNError(
            f"A guarantee of {risk:.2%} errors at the most needs {needed:,} images without a single error, and the "
            f"certification split has {images:,} to count: ask for a larger risk, or use more images (no light mode)."
        )
    return steps, needed


def threshold_for_risk(confidence: np.ndarray, correct: np.ndarray, risk: float, delta: float = 0.05) -> Certificate:
    """A threshold of large coverage whose true error rate is at most `risk`, guaranteed.

    Source: selection with guaranteed risk (Geifman & El-Yaniv 2017, algorithm 1). A binary search asks for the bound of
    the error rate at no more than ceil(log2 N) thresholds, which share `delta` (Bonferroni); it finds the largest
    coverage where the bound grows with the coverage. The guarantee holds for images of the same distribution, if
    neither the model nor its calibration has seen the ones given here, and if accepting more does not lower the true
    error rate: then all thresholds on the way to a wrong one are fixed beforehand, and the sharing is exact.

    Args:
        confidence: (N,). correct: bool (N,), whether the prediction is correct.
        risk: error rate among the accepted, 0 to 1. delta: probability of failure, 0 to 1.

    Raises:
        MSCNNError: a value outside its range; too few images for any such guarantee; or no threshold reaches it.

    Example:
        >>> confidence, correct = np.linspace(0, 1, 1000), np.arange(1000) >= 100  # 100 are incorrect
        >>> certificate = threshold_for_risk(confidence, correct, 0.05)
        >>> round(certificate.threshold, 3), certificate.errors, certificate.accepted
        (0.071, 29, 929)
    """
    confidence, correct = checked_pair(confidence, correct)
    steps, needed = check_certification_size(len(correct), risk, delta)
    descending = np.sort(confidence)[::-1]
    low, high, best = needed - 1, len(correct) - 1, None  # fewer than that cannot reach it
    for _ in range(steps):
        middle = (low + high + 1) // 2
        accepted = confidence >= descending[middle]  # with all images of the same confidence
        errors, count = int((accepted & ~correct).sum()), int(accepted.sum())
        bound = risk_upper_bound(errors, count, delta / steps)
        if bound <= risk:
            low = middle
            if best is None or count > best.accepted:
                best = Certificate(float(descending[middle]), risk, delta, bound, errors, count, len(correct))
        else:
            high = max(middle - 1, low)
    if best is None:
        errors = np.cumsum(~correct[np.argsort(-confidence, kind="stable")])  # among the most confident 1, 2, 3, ...
        least = min(
            risk_upper_bound(int(errors[i]), i + 1, delta / steps) for i in np.flatnonzero(np.diff(errors, append=-1))
        )
        raise MSCNNError(
            f"No threshold guarantees {risk:.2%} errors at the most with probability {_kept(delta)} on these "
            f"{len(correct):,} images: ask for a larger risk, from about {least:.2%} on."
        )
    return best


def threshold_for_coverage(confidence: np.ndarray, coverage: float) -> float:
    """The highest threshold that accepts at least this share of the given images, 0 to 1.

    Raises:
        MSCNNError: coverage is not a share, or there are no images.
    """
    check_share("coverage", coverage, zero=False)
    (confidence,) = one_per_image(confidence=confidence)
    check_numbers(confidence)
    if not len(confidence):
        raise MSCNNError("A threshold for a coverage needs images to count: there are none.")
    wanted = int(np.ceil(coverage * len(confidence) - 1e-9))  # 0.7 of 10 images are 7, whatever 0.7 is in binary
    return float(np.sort(confidence)[::-1][wanted - 1])


def thresholds_by_category(category: np.ndarray, confidence: np.ndarray, coverage: float, count: int) -> np.ndarray:
    """A threshold for each predicted category that accepts this share of the images sent to it: (count,).

    One threshold for all accepts fewer images of a hard category than of an easy one; these accept the same share of
    each, and so more errors of the hard ones. A category without images gets the threshold of all.
    """
    category, confidence = one_per_image(category=category, confidence=confidence)
    check_categories_within(category, count)
    groups = [confidence[category == c] for c in range(count)]
    return np.array([threshold_for_coverage(one if len(one) else confidence, coverage) for one in groups])


def threshold_for_costs(incorrect: float, other: float) -> float:
    """The threshold of least expected cost: of incorrect answers and of OTHER; a correct answer costs nothing.

    An answer of confidence p costs `incorrect` (1 - p) on average: so it pays from p = 1 - other / incorrect on (Chow,
    "On optimum recognition error and reject tradeoff", 1970). Holds as far as the confidence is calibrated.

    Raises:
        MSCNNError: a cost is not positive.
    """
    check_rate("the cost of an incorrect answer", incorrect)
    check_rate("the cost of OTHER", other)
    return max(0.0, 1 - other / incorrect)


def checked_thresholds(value: float | Sequence[float] | np.ndarray, count: int) -> float | np.ndarray:
    """A float or a new float64 array (count,), whatever numbers were given.

    Raises:
        MSCNNError: one is no confidence, or there are neither one nor `count` of them.
    """
    if np.shape(check_threshold(value)) not in ((), (count,)):
        raise MSCNNError(f"Thresholds are {np.shape(value)}: give one for all, or one per category, ({count},).")
    values = np.array(value, np.float64)
    return values if values.ndim else float(values)


def threshold_text(model: MultiStageCNN) -> str:
    """What a model's threshold is, how it was chosen, and what is guaranteed of it; printable."""
    value = model.threshold
    chosen = f"Thresholds {_span(value, '.4f')} by category" if np.ndim(value) else f"Threshold {value:.4f}"
    return f"{chosen}, {model.threshold_source}. {model.guarantee()}"


def guarantee_text(certificate: Certificate | None, threshold: float | np.ndarray) -> str:
    """What is guaranteed of decisions at a threshold, in one line."""
    if certificate is None:
        return "No error rate is guaranteed: the model was not certified after its last training and calibration."
    if np.any(certificate.threshold != threshold):
        return (
            f"No error rate is guaranteed at threshold {_span(threshold, 'g')}, but one of at most "
            f"{_promised(certificate.risk)} at {float(certificate.threshold)!r} "  # exact, for it may be typed
            "(mscnn decide --threshold, or model.threshold = model.certificate.threshold)."
        )
    return certificate.text()


def _span(threshold: float | np.ndarray, form: str) -> str:
    """A threshold, or the least and the largest of several."""
    return " to ".join(f"{value:{form}}" for value in sorted({np.min(threshold), np.max(threshold)}))
