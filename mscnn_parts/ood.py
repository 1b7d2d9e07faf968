"""Images that belong to no category: the OOD score that notices them, and synthetic ones to try it with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mscnn_parts.data import Dataset
from mscnn_parts.decision import ACCEPTED, Decisions, StageScores, confidence_log_odds
from mscnn_parts.pictures import read_image

if TYPE_CHECKING:
    from mscnn_parts.model import MultiStageCNN

ID_REJECTION_RATE = 0.01  # share of the calibration images that is rejected: the price of noticing what is foreign
OWN_REJECTION_RATE = 0.0025  # of them, by the block 1 term alone, and by the whitening term alone
FEW_IMAGES = 1000  # below this number a quantile of a hundredth is a matter of chance
FEW_REJECTION_RATE = 0.0005  # then, by the sum, whose tail is the heaviest; gross strangers show in the other two


class OODStatistics(NamedTuple):
    """What images of the categories look like, to notice what belongs to none of them; all float64."""

    block1_mean: np.ndarray  # (T,), of the train images' block 1 means
    block1_precision: np.ndarray  # (T, T), the inverse of their covariance
    whitening_mean: np.ndarray  # (D,), of the train images' whitening strengths
    whitening_precision: np.ndarray  # (D, D), the inverse of their covariance
    scale: np.ndarray  # (2, 4): mean and standard deviation of each term on the calibration split
    thresholds: np.ndarray  # (3,), above which an image is rejected: of the sum, the block 1 and the whitening term


def ood_terms(
    logits: np.ndarray,
    log_odds: np.ndarray,
    block1_means: np.ndarray,
    whitening_strength: np.ndarray,
    statistics: OODStatistics,
) -> np.ndarray:
    """Four terms that grow as an image becomes less like those of the categories, float64 (B, 4).

    The energy of Stage 1's logits, high where no category speaks up (Liu et al. 2020). The log-odds of an error, by
    both stages. The block 1 term: the log squared Mahalanobis distance of Stage 1's first block, which sees edges and
    colors, to the mean of the train images (Lee et al. 2018 use it for every layer and category). The whitening term:
    the same distance of the whitening filters' log strengths, which fall without end where an image is flat.

    Args:
        logits: Stage 1's mean over the views, (B, C). log_odds: of the confidence, (B,).
        block1_means: (B, T). whitening_strength: (B, D); for both see `Stage1Outputs`.
    """
    energy = -np.logaddexp.reduce(logits.astype(np.float64), axis=1)  # (B,)
    block1 = _log_distance(block1_means, statistics.block1_mean, statistics.block1_precision)
    whitening = _log_distance(whitening_strength, statistics.whitening_mean, statistics.whitening_precision)
    return np.stack([energy, -log_odds, block1, whitening], axis=1)


def _log_distance(features: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Log squared Mahalanobis distance of features (B, K), float64 (B,)."""
    shifted = features - mean  # (B, K)
    # By einsum, without BLAS, whose threads would compete with TensorFlow's: a matrix product here took 20 ms, not 1.
    return np.log(np.maximum((np.einsum("bk,kl->bl", shifted, precision) * shifted).sum(axis=1), 1e-12))


def ood_score(terms: np.ndarray, statistics: OODStatistics) -> np.ndarray:
    """The OOD score, float64 (B,): above 0 an image is rejected as out of distribution.

    It is the sum of the first three standardized terms less its threshold. The block 1 term counts only above its
    mean: unusual colors are suspicious, usual ones prove nothing, since nearly every photograph has them. The block 1
    and the whitening term have thresholds of their own, too: on noise the stages may be more confident than ever, and
    would outvote them. Only beyond such a threshold does the excess replace the sum, if it is larger; the order of all
    other images is that of the sum. NaN in a model without statistics.

    Args:
        terms: (B, 4), see `ood_terms`.
    """
    above = _compared_with_thresholds(terms, statistics) - statistics.thresholds  # (B, 3)
    own = above[:, 1:].max(axis=1)
    return np.where(own > 0, np.maximum(above[:, 0], own), above[:, 0])


def _compared_with_thresholds(terms: np.ndarray, statistics: OODStatistics) -> np.ndarray:
    """The sum, the block 1 and the whitening term, standardized, float64 (B, 3)."""
    mean, deviation = statistics.scale
    energy, doubt, block1, whitening = ((terms - mean) / deviation).T  # (B,) each
    return np.stack([energy + doubt + np.maximum(0, block1), block1, whitening], axis=1)


def fit_feature_statistics(block1_means: np.ndarray, whitening_strength: np.ndarray) -> OODStatistics:
    """Fits means and precisions on train images, (N, T) and (N, D); `fit_ood_scale` adds scale and thresholds.

    Covariances are shrunk (Ledoit and Wolf 2004), for few images.
    """
    from sklearn.covariance import LedoitWolf

    fitted = []
    for features in (block1_means, whitening_strength):
        covariance = LedoitWolf(store_precision=False).fit(features).covariance_
        ridge = 1e-6 * max(np.trace(covariance), 1e-6) * np.eye(len(covariance))  # for channels that are always 0
        fitted += [features.mean(axis=0, dtype=float), np.linalg.inv(covariance + ridge)]
    return OODStatistics(*fitted, scale=np.full((2, 4), np.nan), thresholds=np.full(3, np.nan))


def fit_ood_scale(statistics: OODStatistics, terms: np.ndarray) -> OODStatistics:
    """Returns the statistics with scale and thresholds fitted on the terms (N, 4) of calibration images.

    ID_REJECTION_RATE of the images exceed a threshold: OWN_REJECTION_RATE that of the block 1 term, as many that of
    the whitening term, and the rest that of the sum. Fewer than FEW_IMAGES tell little of their own tails. Then one
    image at most exceeds a threshold, that of the sum, and no threshold is below the bound that the next image of a
    normal distribution exceeds with a probability of OWN_REJECTION_RATE, or FEW_REJECTION_RATE for the sum (its
    prediction interval, Student's t).
    """
    statistics = statistics._replace(scale=np.stack([terms.mean(axis=0), np.maximum(terms.std(axis=0), 1e-6)]))
    parts, count = _compared_with_thresholds(terms, statistics), len(terms)  # (N, 3)
    few = count < FEW_IMAGES
    beyond, own = (1, 0) if few else (int(ID_REJECTION_RATE * count), int(OWN_REJECTION_RATE * count))
    block1, whitening = (_exceeded_by(own, values) for values in parts[:, 1:].T)
    usual = ~((parts[:, 1] > block1) | (parts[:, 2] > whitening))  # all, where the features are not fitted yet: NaN
    thresholds = np.array([_exceeded_by(beyond - (~usual).sum(), parts[usual, 0]), block1, whitening])
    if few and count > 1:
        rates = np.array([FEW_REJECTION_RATE, OWN_REJECTION_RATE, OWN_REJECTION_RATE])
        thresholds = np.maximum(thresholds, _next_image_bound(parts, rates))
    return statistics._replace(thresholds=thresholds)


def combine(scores: StageScores, coefficients: np.ndarray, statistics: OODStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of the confidence, float64 (B,), and the terms of the OOD score, (B, 4), of both stages' scores.

    Args:
        coefficients: of the calibration, (C, 3).
    """
    log_odds = confidence_log_odds(coefficients, scores.category, scores.stage1, scores.stage2)
    features = scores.block1_means, scores.whitening_strength
    return log_odds, ood_terms(scores.mean_logits, log_odds, *features, statistics)


def fit_ood(model: MultiStageCNN, data: Dataset, images: int = 5000) -> None:
    """Fits what images of the categories look like to Stage 1, as it is; see `ood_score`.

    That changes which images are accepted, so it voids a guarantee.

    Args:
        images: about how many of the train split are looked at. The calibration split is looked at whole, if the
            model is calibrated; else `calibrate` does so.
    """
    model.certificate = None
    sample = data.train.images[:: -(-len(data.train) // images)]  # from all over: they may be sorted by category
    outputs = model.stage1_outputs(sample)
    model.ood_statistics = fit_feature_statistics(outputs.block1_means, outputs.whitening_strength)
    if model.is_calibrated:
        fit_model_scale(model, model.scores(data.calibration.images))


def fit_model_scale(model: MultiStageCNN, scores: StageScores) -> None:
    """Fits scale and thresholds of the model's OOD score on both stages' scores of the calibration split."""
    terms = combine(scores, model.calibration_coefficients.numpy(), model.ood_statistics)[1]
    model.ood_statistics = fit_ood_scale(model.ood_statistics, terms)


def _exceeded_by(count: int, values: np.ndarray) -> float:
    """The limit that `count` of the values exceed."""
    return float(np.sort(values)[::-1][min(count, len(values) - 1)])


def _next_image_bound(values: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The bound (K,) that the next row of normally distributed values (N, K) exceeds with a probability of `share`."""
    from scipy.stats import t

    factor = t.ppf(1 - share, len(values) - 1) * np.sqrt(1 + 1 / len(values))
    return values.mean(axis=0) + factor * values.std(axis=0, ddof=1)


def synthetic_ood_images(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Images that belong to no category, as many of each kind as are given: uint8 (B, H, W, channels).

    Args:
        images: some of the data set; what is scrambled are 16 patches of each. The first single colors are white,
            black and gray.
    """
    rng, (height, width) = np.random.default_rng(seed), images.shape[1:3]
    scrambled = images.copy()
    cut = scrambled[:, : height // 4 * 4, : width // 4 * 4]  # what four patches do not fill stays
    patches = cut.reshape(len(cut), 4, height // 4, 4, width // 4, -1).swapaxes(2, 3)  # (B, 4, 4, H/4, W/4, channels)
    flat = patches.reshape(len(cut), 16, *patches.shape[3:])
    colors = rng.integers(0, 256, (len(images), 1, 1, images.shape[-1]), dtype=np.uint8)
    colors[:3] = np.array([255, 0, 128], np.uint8)[: len(images), None, None, None]
    mixed = rng.permuted(np.broadcast_to(np.arange(16), (len(cut), 16)), axis=1)  # (B, 16)
    shuffled = np.take_along_axis(flat, mixed[:, :, None, None, None], axis=1).reshape(patches.shape)
    cut[...] = shuffled.swapaxes(2, 3).reshape(cut.shape)
    return {
        "uniform noise": rng.integers(0, 256, images.shape, dtype=np.uint8),
        "Gaussian noise": rng.normal(128, 64, images.shape).clip(0, 255).astype(np.uint8),
        "one color": np.broadcast_to(colors, images.shape).copy(),
        "stripes": _stripes(images.shape, rng),
        "scrambled": scrambled,
    }


def _stripes(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Upright, level and slanting stripes of 1 to 8 pixels in two colors, uint8 of a shape (B, H, W, channels)."""
    count, height, width, channels = shape
    rows, columns = np.indices((height, width))
    across = np.stack([columns, rows, rows + columns])[np.arange(count) % 3]  # (B, H, W)
    odd = (across // rng.integers(1, 9, (count, 1, 1)) % 2).astype(bool)
    colors = rng.integers(0, 256, (2, count, 1, 1, channels), dtype=np.uint8)
    return np.where(odd[..., None], *colors)


def foreign_photographs(input_shape: Sequence[int]) -> np.ndarray:
    """The two photographs that come with scikit-learn, a temple and a flower, shrunk whole as `read_image` does it.

    Returns:
        uint8 (2, H, W, channels).
    """
    from importlib.resources import as_file, files

    photographs = []
    for name in ("china.jpg", "flower.jpg"):
        with as_file(files("sklearn.datasets.images") / name) as path:
            photographs.append(read_image(path, input_shape))
    return np.stack(photographs)


def unnoticed(verdicts: dict[str, Decisions], share: float = 0.05) -> dict[str, float]:
    """The kinds of images of no category of which more than `share` is accepted, and how many are: 0 to 1."""
    accepted = {kind: float((decisions.reasons() == ACCEPTED).mean()) for kind, decisions in verdicts.items()}
    return {kind: share_accepted for kind, share_accepted in accepted.items() if share_accepted > share}
