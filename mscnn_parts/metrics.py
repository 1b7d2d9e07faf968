"""Reports and selective metrics (NumPy in, NumPy out)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mscnn_parts.checks import (
    check_categories_within,
    check_count,
    check_share,
    checked_labels,
    checked_pair,
    one_per_image,
)
from mscnn_parts.decision import Decisions, log_odds
from mscnn_parts.settings import OTHER, MSCNNError


def log_loss_by_category(category: np.ndarray, confidence: np.ndarray, correct: np.ndarray, count: int) -> np.ndarray:
    """How badly the confidences fit, by predicted category: mean negative log likelihood in nats, (count,).

    A proper score: it falls when the confidences rank better and when they are better calibrated. NaN where
    Stage 1 predicts a category for no image.
    """
    confidence, correct = checked_pair(confidence, correct, share=True)
    category, _ = one_per_image(category=category, confidence=confidence)
    check_categories_within(category, count)
    given = np.clip(np.where(correct, confidence, 1 - confidence), 1e-12, 1)  # what was given to the truth
    images = np.bincount(category, minlength=count)
    total = np.bincount(category, weights=-np.log(given), minlength=count)
    return np.divide(total, images, out=np.full(count, np.nan), where=images > 0)


def risk_coverage(confidence: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The risk-coverage curve: the error rate among the k most confident images, for k = 1..N.

    Images of equal confidence cannot be told apart, so each counts with the group's mean error, what a random order
    of them gives in the mean: the curve does not depend on the order of the images. Source: Geifman & El-Yaniv 2017,
    section 2.

    Args:
        confidence: float (N,), any scale. correct: bool (N,).

    Returns:
        coverage float64 (N,), ascending to 1, and selective risk float64 (N,).

    Example:
        >>> coverage, risk = risk_coverage(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, False, True]))
        >>> coverage.tolist(), risk.round(3).tolist()
        ([0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.333, 0.25])
    """
    confidence, correct = checked_pair(confidence, correct)
    incorrect = 1.0 - correct
    _, group = np.unique(-confidence, return_inverse=True)  # 0: the most confident
    mean_wrong = np.bincount(group, weights=incorrect) / np.bincount(group)
    accepted = np.arange(1, len(incorrect) + 1)
    return accepted / len(incorrect), np.cumsum(mean_wrong[np.sort(group)]) / accepted


def aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area under the risk-coverage curve: the mean selective risk over all coverages (Geifman et al. 2019).

    Example:
        >>> round(aurc(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, False, True])), 4)
        0.1458
    """
    return float(risk_coverage(confidence, correct)[1].mean())


def e_aurc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """How far the AURC lies above the least that this accuracy allows, every correct image before every incorrect one.

    Source: excess AURC (Geifman et al. 2019).
    """
    _, correct = checked_pair(confidence, correct)
    return aurc(confidence, correct) - aurc(correct.astype(np.float64), correct)


def augrc(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area under the generalized risk-coverage curve: mean share of all images that are accepted and incorrect.

    Unlike in the AURC an error counts the same at every coverage. By the trapezoidal rule it is exactly
    (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 with accuracy a. Source: Traub et al. 2024.
    """
    coverage, risk = risk_coverage(*checked_pair(confidence, correct, empty=False))
    undetected = coverage * risk  # (N,)
    return float((undetected.sum() - undetected[-1] / 2) / len(undetected))


def risk_at_coverage(confidence: np.ndarray, correct: np.ndarray, coverage: float) -> float:
    """Error rate among the most confident images, at least this share of all; ties as in `risk_coverage`."""
    check_share("coverage", coverage)
    covered, risk = risk_coverage(*checked_pair(confidence, correct, empty=False))
    return float(risk[np.searchsorted(covered, coverage - 1e-9)])


def coverage_at_risk(confidence: np.ndarray, correct: np.ndarray, error: float) -> float:
    """The largest share of images that can be accepted with at most this error rate among them; 0: none.

    Among images of equal confidence some can be accepted by lot: ties as in `risk_coverage`.
    """
    check_share("error", error)
    covered, risk = risk_coverage(confidence, correct)
    return float(covered[risk <= error + 1e-9].max(initial=0.0))


def failure_metrics(confidence: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """How well a confidence tells correct from incorrect predictions: misclassification detection (failure prediction).

    Sources: Hendrycks & Gimpel 2017 (AUROC), Jaeger et al. 2023 (why the AURC belongs beside it).

    Args:
        confidence: float (N,), any scale. correct: bool (N,).

    Returns:
        aurc; auroc_failure: probability that a correct image has the higher confidence; fpr95: share of the
        incorrect images accepted at the highest threshold that accepts 95 % of the correct ones. The last two are
        NaN where all predictions are correct, or all incorrect.

    Example:
        >>> failure_metrics(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, False, True]))
        {'aurc': 0.1458..., 'auroc_failure': 0.6666..., 'fpr95': 1.0}
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    confidence, correct = checked_pair(confidence, correct)
    if correct.all() or not correct.any():
        return {"aurc": aurc(confidence, correct), "auroc_failure": np.nan, "fpr95": np.nan}
    false_positives, true_positives, _ = roc_curve(correct, confidence, drop_intermediate=False)
    return {
        "aurc": aurc(confidence, correct),
        "auroc_failure": float(roc_auc_score(correct, confidence)),
        "fpr95": float(false_positives[np.searchsorted(true_positives, 0.95)]),
    }


def selective_metrics(decisions: Decisions, labels: np.ndarray) -> dict[str, float]:
    """What the final decisions are worth, at the threshold they were made with.

    Returns:
        coverage: share of images not sent to OTHER. selective_accuracy: accuracy among those.
        accuracy_other_wrong: accuracy where OTHER counts as an error. stage_report_accuracy: share of
        images accepted where Stage 1 is correct or rejected where it is incorrect.
    """
    labels = checked_labels(decisions.category, labels)
    accepted, correct = decisions.category == decisions.stage1_category, decisions.stage1_category == labels
    return {
        "coverage": accepted.mean(),
        "selective_accuracy": correct[accepted].mean() if accepted.any() else np.nan,
        "accuracy_other_wrong": (accepted & correct).mean(),
        "stage_report_accuracy": (accepted == correct).mean(),
    }


def category_metrics(decisions: Decisions, labels: np.ndarray, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """What the final decisions are worth for each category: the entry `categories` of `metrics.json`.

    Args:
        labels: true categories, (B,). names: (C,).

    Returns:
        By name, of the images that show the category: their number (images), accuracy, coverage and
        selective_accuracy as in `selective_metrics`; and precision: of those decided to show it, the share that does.
    """
    labels = checked_labels(decisions.category, labels)
    accepted, correct = decisions.category == decisions.stage1_category, decisions.stage1_category == labels

    def share(hits: np.ndarray) -> float:
        return hits.mean() if len(hits) else np.nan

    return {
        name: {
            "images": int((labels == c).sum()),
            "accuracy": share(correct[labels == c]),
            "coverage": share(accepted[labels == c]),
            "selective_accuracy": share(correct[(labels == c) & accepted]),
            "precision": share(correct[decisions.category == c]),
        }
        for c, name in enumerate(names)
    }


def evaluate(decisions: Decisions, labels: np.ndarray, threshold: float) -> dict[str, dict[str, float]]:
    """The entries `stage1` and `two_stage` of `metrics.json`; all rates are fractions of 1.

    `stage1` is Stage 1 alone: its answers on one view, and its softmax as their confidence.
    """
    labels = checked_labels(decisions.category, labels)
    correct, alone = decisions.stage1_category == labels, decisions.single_view_logits.argmax(axis=1)
    odds = log_odds(decisions.single_view_logits, alone)
    return {
        "stage1": {"accuracy": (alone == labels).mean(), **failure_metrics(odds, alone == labels)},
        "two_stage": {
            "threshold": threshold,
            "accuracy": correct.mean(),
            **selective_metrics(decisions, labels),
            "ood_rejection_rate": np.where(np.isnan(decisions.ood_score), np.nan, decisions.ood_score > 0).mean(),
            **failure_metrics(decisions.confidence, correct),
        },
    }


def paired_difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """How much more often `second` holds than `first`, on the same images, and its 95 % interval.

    Only images where the two differ say anything of the difference. With half an image added to each of the four
    counts, the interval holds also where these are few (Agresti & Min 2005, Statistics in Medicine 24).

    Args:
        first, second: bool (N,).

    Returns:
        Difference of the two shares, lower and upper end.
    """
    first, second = one_per_image(first=first, second=second)
    if not first.dtype == second.dtype == bool:
        raise MSCNNError(f"first is {first.dtype} and second {second.dtype}: give whether something holds, as bool.")
    gained, lost, count = (second & ~first).sum() + 0.5, (first & ~second).sum() + 0.5, len(first) + 2
    middle = (gained - lost) / count
    half = 1.96 * np.sqrt((gained + lost) / count - middle**2) / np.sqrt(count)
    return (gained - lost) / max(1, len(first)), max(-1.0, middle - half), min(1.0, middle + half)


def format_difference(difference: tuple[float, float, float]) -> str:
    """A difference of rates and its interval, see `paired_difference`, in percentage points: for a table."""
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * one for one in difference))


class Comparison(NamedTuple):
    """Two models' decisions on the same images of one true category, the second against the first."""

    category: str
    images: int
    changed: int  # images that are decided differently
    coverage: tuple[float, float, float]  # difference of the accepted share, and its interval
    errors: tuple[float, float, float]  # the same of the share that is accepted and incorrect


def compare_decisions(
    first: Decisions, second: Decisions, labels: np.ndarray, names: Sequence[str]
) -> list[Comparison]:
    """Compares two models, or one before and after a retraining, image by image; a row each true category, then all.

    Args:
        labels: true categories, (B,). names: C.
    """
    one_per_image(first=first.category, second=second.category)
    labels = checked_labels(first.category, labels)
    accepted = [one.category < len(names) for one in (first, second)]
    incorrect = [taken & (one.category != labels) for taken, one in zip(accepted, (first, second), strict=True)]
    groups = [(name, labels == c) for c, name in enumerate(names)] + [("all", np.ones(len(labels), bool))]
    return [
        Comparison(
            name,
            int(chosen.sum()),
            int((first.category != second.category)[chosen].sum()),
            paired_difference(*(one[chosen] for one in accepted)),
            paired_difference(*(one[chosen] for one in incorrect)),
        )
        for name, chosen in groups
    ]


def stage_report_labels(decisions: Decisions, labels: np.ndarray, other: int) -> np.ndarray:
    """The truth of the stage report: the category where Stage 1 is correct, OTHER where it is incorrect; (B,)."""
    labels = checked_labels(decisions.category, labels)
    return np.where(decisions.stage1_category == labels, labels, other)


def decision_report(labels: np.ndarray, decided: np.ndarray, names: Sequence[str]) -> str:
    """scikit-learn's report over the C categories and OTHER."""
    from sklearn.metrics import classification_report

    labels, decided = one_per_image(labels=labels, decided=decided)
    rows = {"labels": range(len(names) + 1), "target_names": [*names, OTHER]}
    return str(classification_report(labels, decided, **rows, digits=3, zero_division=0))  # pyright: ignore[reportArgumentType]


def decision_confusion(labels: np.ndarray, decided: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Confusion matrix with OTHER last, int (C+1, C+1): rows are the truth, columns the decision."""
    from sklearn.metrics import confusion_matrix

    labels, decided = one_per_image(labels=labels, decided=decided)
    return confusion_matrix(labels, decided, labels=range(len(names) + 1))


def reliability(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence, accuracy and number of images in equally wide bins, each (bins,); NaN where empty."""
    confidence, correct = checked_pair(confidence, correct, share=True)
    check_count("bins", bins)
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(where, minlength=bins)
    sums = [np.bincount(where, weights=values, minlength=bins) for values in (confidence, correct)]
    mean, accuracy = (np.divide(s, count, out=np.full(bins, np.nan), where=count > 0) for s in sums)
    return mean, accuracy, count


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 10, equal_mass: bool = False) -> float:
    """Expected calibration error: mean gap between confidence and accuracy over the bins (Guo et al. 2017).

    Args:
        equal_mass: bins that hold equally many images (Nixon et al. 2019, "Measuring calibration in deep learning"),
            else equally wide ones, of which most may be empty. Images of equal confidence that fall into two bins
            count in both with their mean accuracy, so that their order does not matter.
    """
    check_count("bins", bins)
    confidence, correct = checked_pair(confidence, correct, share=True, empty=not equal_mass)
    if equal_mass:
        _, group = np.unique(confidence, return_inverse=True)
        correct = (np.bincount(group, weights=correct) / np.bincount(group))[group]
        parts = np.array_split(np.argsort(confidence, kind="stable"), bins)
        gaps = [abs(confidence[part].mean() - correct[part].mean()) * len(part) for part in parts if len(part)]
        return float(sum(gaps) / len(confidence))
    mean, accuracy, count = reliability(confidence, correct, bins)
    return float(np.nansum(np.abs(mean - accuracy) * count) / count.sum())
