"""What arrays that are given by a user have to be."""

from __future__ import annotations

from typing import Any

import numpy as np

from mscnn_parts.settings import MSCNNError


def one_per_image(**given: Any) -> list[np.ndarray]:
    """What is given by name as arrays, or raises MSCNNError if they are not (N,) with the same N."""
    arrays = {name: np.asarray(value) for name, value in given.items()}
    if len({array.shape for array in arrays.values()}) > 1 or any(array.ndim != 1 for array in arrays.values()):
        shapes = " and ".join(f"{name} {array.shape}" for name, array in arrays.items()).replace(" ", " is ", 1)
        raise MSCNNError(f"{shapes}: give one of each an image, (N,).")
    return list(arrays.values())


def checked_labels(category: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels as an array, or raises MSCNNError if they are not integers, one for each image that was decided on."""
    _, labels = one_per_image(decisions=category, labels=labels)
    if labels.dtype.kind not in "iu" and len(labels):
        raise MSCNNError(f"labels are {labels.dtype}: give the true categories as integers from 0.")
    return labels


def check_share(name: str, value: float, zero: bool = True, one: bool = True) -> None:
    """Raises MSCNNError unless a value is a number from 0 to 1; without 0 or without 1, if it may not be these."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not (number and 0 <= value <= 1 and (zero or value > 0) and (one or value < 1)):
        shown = f"{value:g}" if number else repr(value)
        limits = {
            (True, True): "from 0 to 1", (True, False): "from 0 to below 1",
            (False, True): "above 0 and up to 1", (False, False): "between 0 and 1",
        }[zero, one]  # fmt: skip
        raise MSCNNError(f"{name} is {shown}: it is a share, a number {limits}, such as 0.01 for 1 %.")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises MSCNNError unless a value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise MSCNNError(f"{name} is {value!r}: it has to be a whole number from {least} on.")


def check_rate(name: str, value: float, zero: bool = False) -> None:
    """Raises MSCNNError unless a value is a finite number above 0, or also 0 if it may be that."""
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and np.isfinite(value)
    if not (number and (value > 0 or (zero and value == 0))):
        raise MSCNNError(f"{name} is {value!r}: it has to be a number {'from 0 on' if zero else 'above 0'}.")


def check_numbers(confidence: np.ndarray) -> None:
    """Raises MSCNNError unless confidences are numbers, none of them NaN."""
    if confidence.dtype.kind not in "biuf":
        raise MSCNNError(f"confidence is {confidence.dtype}: it has to be numbers.")
    unknown = int(np.isnan(confidence).sum())
    if unknown:
        raise MSCNNError(f"{unknown:,} of {len(confidence):,} confidences are NaN: leave out these images.")


def check_categories_within(category: np.ndarray, count: int) -> None:
    """Raises MSCNNError unless categories are integers from 0 to below `count`."""
    if category.dtype.kind not in "iu" or (len(category) and not 0 <= category.min() <= category.max() < count):
        found = (
            f"{category.min()} to {category.max()}" if category.dtype.kind in "iuf" and len(category) else "no numbers"
        )
        raise MSCNNError(f"Categories are {category.dtype}, {found}: use integers from 0 to {count - 1}.")


def checked_pair(
    confidence: np.ndarray, correct: np.ndarray, share: bool = False, empty: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Confidences, numbers (N,), and whether each prediction is correct, bool (N,), as arrays.

    Args:
        share: whether a confidence has to lie between 0 and 1. empty: whether there may be none.

    Raises:
        MSCNNError: they are not that.
    """
    confidence, correct = one_per_image(confidence=confidence, correct=correct)
    if not len(correct):
        if not empty:
            raise MSCNNError("confidence and correct are empty: there is nothing to measure without an image.")
        return confidence.astype(np.float64), correct.astype(bool)
    if correct.dtype != bool:  # 0 and 1, too: they may be labels, and any other label would count as correct
        raise MSCNNError(
            f"correct is {correct.dtype}, not bool: it says of each prediction whether it is correct, "
            "such as labels == predicted."
        )
    check_numbers(confidence)
    if share and (confidence.min() < -1e-6 or confidence.max() > 1 + 1e-6):  # a float32 softmax may exceed 1
        least, most = confidence.min(), confidence.max()
        raise MSCNNError(f"Confidences lie between {least:g} and {most:g}: use 0 to 1; expit() makes them of log-odds.")
    return confidence.astype(np.float64), correct
