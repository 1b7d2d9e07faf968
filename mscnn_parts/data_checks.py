"""Looks for what is wrong with a data set before a network has to learn it: range, labels, balance, leaks, negatives.

Every check returns findings; none means that nothing was found. `check_data` runs those that need no classifier.

References
    Barz & Denzler, "Do We Train on Test Data? Purging CIFAR of Near-Duplicates", J. Imaging 2020.
    Northcutt, Jiang & Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021.
    Krawetz, "Kind of Like That", 2013 (dHash).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mscnn_parts.checks import check_categories_within, one_per_image
from mscnn_parts.data import Dataset, Split
from mscnn_parts.files import in_chunks
from mscnn_parts.on_disk import unless_large
from mscnn_parts.settings import MSCNNError

HASH_SIDE = 8  # a hash has 8 x 8 bits
MOST_CANDIDATES = 1_000_000  # pairs whose pixels are compared: some ten seconds for 32 pixels
HARD_SHARE = 0.2  # of a verifier's negatives from the hardest tenth of all others; at random it is 0.1
IMBALANCE = 3.0  # times as many images in the largest category as in the smallest: worth a finding


class Finding(NamedTuple):
    """Something that is wrong: `name` is fixed, the rest is for a person."""

    name: str
    where: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        return f"! {self.name}, {self.where}: {self.evidence}.\n  {self.remedy}"


def findings_text(findings: Sequence[Finding]) -> str:
    """Findings as lines that a person can read."""
    return "\n".join(map(str, findings)) or "No findings."


# ---- form and range


def check_images(images: np.ndarray, where: str = "images") -> list[Finding]:
    """Checks that images (N, H, W, channels) are what the project's networks take: uint8 from 0 to 255."""
    if not len(images):
        return [Finding("no images", where, "there is none", "Look whether the right folder or file was read.")]
    images, limits, single = unless_large(images), [], []
    for chunk in map(np.asarray, in_chunks(images)):
        limits += [chunk.min(), chunk.max()]
        single.append(np.ptp(chunk.reshape(len(chunk), -1), axis=1) == 0)
    least, most, flat = float(min(limits)), float(max(limits)), np.flatnonzero(np.concatenate(single))
    evidence = f"{images.dtype} from {least:.3g} to {most:.3g}"
    found = []
    if images.dtype != np.uint8:
        remedy = "Keep images uint8, 0 to 255; if they are 0 to 1: (255 * images).round().astype('uint8')."
        found.append(Finding("value range", where, evidence, remedy))
    elif most <= 1:
        remedy = "They were scaled to 0..1 and then cast, which leaves black images: cast before you scale."
        found.append(Finding("value range", where, evidence, remedy))
    if len(flat):
        evidence = f"{len(flat):,} of {len(images):,} images have one color only, such as number {flat[0]}"
        found.append(Finding("empty images", where, evidence, "Look at them; leave out what failed to load."))
    return found


def check_labels(labels: np.ndarray, categories: int, where: str = "labels") -> list[Finding]:
    """Checks that labels are integers (N,) from 0 to below `categories`, and each category has some."""
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] > 1:
        return [Finding("one-hot labels", where, f"the shape is {labels.shape}", "Use labels.argmax(axis=1).")]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        remedy = "Use one integer per image: labels.ravel().astype('int64')."
        return [Finding("label type", where, f"{labels.dtype} {labels.shape}", remedy)]
    if not len(labels):
        return [Finding("no labels", where, "there is none", "Look whether the right folder or file was read.")]
    least, most = labels.min(), labels.max()
    if least < 0 or most >= categories:
        shifted = most - least < categories
        remedy = f"Subtract {least}." if shifted else "Count the categories again, or number them anew from 0."
        evidence = f"they run from {least} to {most}; {categories} categories are 0 to {categories - 1}"
        return [Finding("shifted labels" if shifted else "label range", where, evidence, remedy)]
    counts = np.bincount(labels, minlength=categories)
    absent = np.flatnonzero(counts == 0)
    if len(absent):
        evidence = f"no image of {', '.join(map(str, absent[:10]))}"
        return [Finding("missing categories", where, evidence, "Add images, or take the category out.")]
    if counts.max() > IMBALANCE * counts.min():
        evidence = (
            f"category {counts.argmax()} has {counts.max():,} images, category {counts.argmin()} {counts.min():,}"
        )
        remedy = "Report accuracy per category; add images of the rare one, or weight its loss (class_weight in fit)."
        return [Finding("class balance", where, evidence, remedy)]
    return []


# ---- duplicates


def dhash(images: np.ndarray) -> np.ndarray:
    """Difference hash: whether brightness rises from each place of an 8 x 9 thumbnail to the next, bool (N, 64).

    It stays nearly the same when an image is scaled, brightened or compressed anew. Source: Krawetz 2013.

    Args:
        images: (N, H, W, channels).
    """
    images = unless_large(images)
    return np.concatenate([np.empty((0, HASH_SIDE**2), bool), *(_dhash(np.asarray(c)) for c in in_chunks(images))])


def _dhash(images: np.ndarray) -> np.ndarray:
    channels = (images[..., c].astype(np.float32) for c in range(images.shape[-1]))
    gray = sum(channels, np.zeros((), np.float32)) / np.float32(images.shape[-1])  # (N, H, W); mean() is slower
    for axis, count in ((1, HASH_SIDE), (2, HASH_SIDE + 1)):
        gray = np.repeat(gray, -(-count // gray.shape[axis]), axis)  # at least a pixel for each place
        edges = np.linspace(0, gray.shape[axis], count + 1).astype(int)
        sums = np.add.reduceat(gray, edges[:-1], axis)
        gray = sums / np.diff(edges).reshape([-1 if axis == i else 1 for i in range(3)])
    return (gray[:, :, 1:] > gray[:, :, :-1]).reshape(len(gray), -1)


class Bounds(NamedTuple):
    """How alike two images have to be to count as copies."""

    distance: int  # bits of 64 in which their hashes may differ
    correlation: float  # the least of their pixels


def copy_bounds(images: np.ndarray) -> Bounds:
    """The bounds for images (N, H, W, channels): strict ones if they are gray or below 16 pixels, else those of photos.

    Two digits of a kind are alike without being copies: within the bounds of photos, most of scikit-learn's digits
    'leak' from train to calibration, where not one pair is the same.
    """
    simple = images.shape[-1] == 1 or min(images.shape[1:3]) < 16
    return Bounds(2, 0.999) if simple else Bounds(10, 0.95)


class Duplicates(NamedTuple):
    """Pairs of images that are the same, or nearly."""

    pairs: np.ndarray  # int64 (n, 2): index in the first array, index in the second
    exact: np.ndarray  # bool (n,): the same in every pixel
    correlation: np.ndarray  # (n,), of their pixels
    distance: int  # all pairs whose hashes differ in at most so many bits were compared; -1: not even all equal ones


def find_duplicates(first: np.ndarray, second: np.ndarray, **bounds: Any) -> Duplicates:
    """Finds images of one split that stand in the other, too, exactly or nearly.

    Hashes that differ in few bits make a candidate: for 32 pixels a thumbnail holds little, so that two skies may share
    one. So the pixels of a candidate have to correlate as well. Of more than a million candidates, those with the most
    similar hashes are compared.

    Args:
        first, second: uint8 (N, H, W, channels) and (M, H, W, channels).
        bounds: `distance` or `correlation` in place of those of `copy_bounds`.
    """
    wanted = copy_bounds(first)._replace(**bounds)
    pairs, distance = _candidates(dhash(first), dhash(second), wanted.distance)
    exact, alike = np.zeros(len(pairs), bool), np.zeros(len(pairs))
    for start in range(0, len(pairs), 1000):
        part = slice(start, start + 1000)
        a, b = (images[pairs[part, i]] for i, images in enumerate((first, second)))
        exact[part] = (a == b).all(axis=(1, 2, 3))
        alike[part] = np.where(exact[part], 1.0, _correlation(a, b))
    kept = np.flatnonzero(exact | (alike >= wanted.correlation))
    kept = kept[np.argsort(-alike[kept], kind="stable")]
    return Duplicates(pairs[kept], exact[kept], alike[kept], distance)


def _candidates(first: np.ndarray, second: np.ndarray, distance: int) -> tuple[np.ndarray, int]:
    """Pairs int64 (n, 2) of hashes within a distance, and the distance within which none was left out."""
    # As ±1 the product of two hashes is 64 - 2 x (bits that differ), and a matrix product compares all at once.
    one, other = (2 * hashes.astype(np.float32) - 1 for hashes in (first, second))  # (N, 64), (M, 64)
    pairs, bits = np.empty((0, 2), np.int64), np.empty(0, np.float32)
    for start in range(0, len(one), 1000):
        apart = (HASH_SIDE**2 - one[start : start + 1000] @ other.T) / 2  # (1000, M)
        near = np.argwhere(apart <= distance)
        pairs, bits = np.concatenate([pairs, near + np.array([start, 0])]), np.concatenate([bits, apart[tuple(near.T)]])
        if len(pairs) > MOST_CANDIDATES:
            order = np.argsort(bits, kind="stable")
            distance = min(distance, int(bits[order[MOST_CANDIDATES]]) - 1)
            pairs, bits = pairs[order[:MOST_CANDIDATES]], bits[order[:MOST_CANDIDATES]]
    return pairs, distance


def _correlation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The correlation of two images' pixels, for n pairs (n, H, W, channels): (n,); 0 for images of one color."""
    flat = [images.reshape(len(images), -1).astype(np.float32) for images in (first, second)]
    centered = [x - x.mean(axis=1, keepdims=True) for x in flat]
    lengths = np.prod([np.linalg.norm(x, axis=1) for x in centered], axis=0)
    return (centered[0] * centered[1]).sum(axis=1) / np.maximum(lengths, 1e-6)


def check_leak(
    first: np.ndarray, second: np.ndarray, names: tuple[str, str] = ("train", "test"), **bounds: Any
) -> list[Finding]:
    """Checks that no image of the first split stands in the second. `find_duplicates` explains images and bounds."""
    duplicates, where, found = find_duplicates(first, second, **bounds), " and ".join(names), []
    if len(duplicates.pairs):
        leaked = len(np.unique(duplicates.pairs[:, 1]))
        evidence = f"{leaked:,} of {len(second):,} {names[1]} images are in {names[0]}"
        evidence += f", {duplicates.exact.sum():,} pairs exactly"
        remedy = f"Take them out of {names[0]}: setdiff1d(arange(len({names[0]})), find_duplicates(...).pairs[:, 0])."
        found.append(Finding("leak", where, evidence, remedy))
    if duplicates.distance < copy_bounds(first)._replace(**bounds).distance:
        evidence = f"the hashes of over {MOST_CANDIDATES:,} pairs are alike: some were not compared"
        remedy = f"Compare the splits in parts, or give distance={max(0, duplicates.distance)}."
        found.append(Finding("copies not ruled out", where, evidence, remedy))
    return found


def check_data(data: Dataset) -> list[Finding]:
    """Checks range, labels and balance of each split, and compares every two splits for copies."""
    found, splits = [], ("train", "calibration", "certification", "test")
    for name in splits:
        split = getattr(data, name)
        found += check_images(split.images, name) + check_labels(split.labels, len(data.category_names), name)
    for first, second in itertools.combinations(splits, 2):
        found += check_leak(getattr(data, first).images, getattr(data, second).images, (first, second))
    return found


# ---- labels against images


def cross_validated(features: np.ndarray, labels: np.ndarray, folds: int = 5, seed: int = 0) -> np.ndarray:
    """Predicts each category's probability by a logistic regression that has not seen the image: float64 (N, C).

    Args:
        features: (N, K), standardized here. labels: integers (N,), each of 0..C-1 at least `folds` times.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if np.ndim(labels) != 1:
        raise MSCNNError(f"labels are {np.shape(labels)}: give one integer per image, (N,).")
    labels = np.asarray(labels)
    check_categories_within(labels, int(labels.max(initial=0)) + 1)
    least = np.bincount(labels).min(initial=len(labels))
    if least < folds:
        raise MSCNNError(f"A category has {least} images: {folds} folds need {folds} or more of each from 0 on.")
    classifier = LogisticRegression(C=10 / features.shape[1], max_iter=200, tol=1e-3)
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with threadpool_limits(1, "blas"):  # its matrices are small: two threads took thirty times as long as one
        pipeline = make_pipeline(StandardScaler(), classifier)
        return np.asarray(cross_val_predict(pipeline, features, labels, cv=parts, method="predict_proba"))


def pixel_features(images: np.ndarray, side: int = 8) -> np.ndarray:
    """Shrinks images (N, H, W, channels) to `side` x `side` by means: flat, float32 (N, side² channels)."""
    if images.ndim != 4 or min(images.shape[1:3]) < side:
        raise MSCNNError(f"Images are {images.shape}: this takes (N, H, W, channels) of {side} pixels or more.")
    step = np.array(images.shape[1:3]) // side
    cut = images[:, : step[0] * side, : step[1] * side].astype(np.float32)
    small = cut.reshape(len(images), side, step[0], side, step[1], images.shape[-1]).mean(axis=(2, 4))
    return small.reshape(len(images), -1)


def check_labels_fit(labels: np.ndarray, probability: np.ndarray) -> list[Finding]:
    """Checks that labels fit the images: a classifier that has not seen an image beats always saying the same.

    Args:
        labels: integers (N,). probability: of `cross_validated`, (N, C).
    """
    from scipy.stats import binomtest

    predicted, share = probability.argmax(axis=1), np.bincount(labels).max() / len(labels)
    correct = int((predicted == labels).sum())
    if binomtest(correct, len(labels), share, alternative="greater").pvalue < 1e-4:
        return []
    evidence = f"a classifier is correct on {correct / len(labels):.1%} of unseen images, one constant on {share:.1%}"
    remedy = "Look at images with their labels: was one array shuffled or sorted without the other?"
    return [Finding("labels do not fit the images", "labels", evidence, remedy)]


def suspected_label_errors(labels: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Lists the images whose label is suspected to be incorrect, most suspicious first: int64 (n,).

    Confident learning. The threshold of a category is the mean probability that images of its label have for it; an
    image is suspected if, of the categories whose threshold it reaches, the most probable is not its label. They are
    ranked by the normalized margin, probability of the label minus the highest other one.
    Source: Northcutt et al. 2021, equations 1 and 2, and section 3.2; their library is cleanlab.

    Args:
        labels: integers (N,). probability: by classifiers that have not seen the image, (N, C).
    """
    check_categories_within(labels, probability.shape[1])
    every = np.arange(len(labels))
    own = probability[every, labels]  # (N,)
    counts = np.bincount(labels, minlength=probability.shape[1])
    threshold = np.bincount(labels, own, minlength=probability.shape[1]) / np.maximum(counts, 1)  # (C,)
    threshold[counts == 0] = np.inf
    reaching = np.where(probability >= threshold, probability, -1.0)  # (N, C)
    suspected = np.flatnonzero((reaching.max(axis=1) >= 0) & (reaching.argmax(axis=1) != labels))
    others = probability.copy()
    others[every, labels] = -1.0
    return suspected[np.argsort((own - others.max(axis=1))[suspected], kind="stable")]


# ---- negatives of a verifier


def check_negatives(labels: np.ndarray, probability: np.ndarray, category: int, indices: np.ndarray) -> list[Finding]:
    """Checks that the negatives that a verifier is trained on are harder than images drawn at random.

    Args:
        labels: of the train split, (N,). probability: Stage 1's of `category`, (N,).
        indices: of the training batches, as of `sample_hard_negatives`.
    """
    labels, probability = one_per_image(labels=labels, probability=probability)
    negatives = indices[labels[indices] != category]
    if not len(negatives):
        return [Finding("no negatives", f"category {category}", "every image is of the category", "Draw others, too.")]
    # By rank, since probabilities of a Stage 1 that was trained with label smoothing are nowhere near 0.
    hardest = np.quantile(probability[labels != category], 0.9)
    share = (probability[negatives] > hardest).mean()
    if share > HARD_SHARE:
        return []
    evidence = f"{share:.0%} of the negatives are among the tenth that Stage 1 finds most like it; of random ones 10%"
    remedy = "The verifier will be asked about what Stage 1 mistakes for it: draw by sample_hard_negatives."
    return [Finding("easy negatives", f"verifier of category {category}", evidence, remedy)]


# ---- all that one batch cannot show


def check_training(
    train: Split | None,
    held: Split | None = None,
    negatives: tuple[np.ndarray, np.ndarray] | None = None,
    category: int | None = None,
) -> list[Finding]:
    """Looks for the faults of a training that only its data show: labels, a leak, easy negatives.

    Args:
        train: the images and labels that are trained on.
        held: the split that measures the training: no image of `train` should stand in it.
        negatives: a verifier's `probability` (N,) and `indices`; they and `category` as of `check_negatives`.

    Raises:
        MSCNNError: no train split, negatives without a category, or a category with fewer than 5 train images.
    """
    if train is None:
        raise MSCNNError("Held-out images and negatives are compared with the train split: give train, too.")
    if negatives is not None and category is None:
        raise MSCNNError("Negatives are those of a verifier: give its category, too.")
    found = check_labels_fit(train.labels, cross_validated(pixel_features(train.images), train.labels))
    if held is not None:
        found += check_leak(train.images, held.images, ("train", "held-out"))
    if negatives is not None and category is not None:
        probability, indices = negatives
        found += check_negatives(train.labels, probability, category, indices)
    return found
