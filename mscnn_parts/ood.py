"""Images that belong to no category: how strange an image is, and made-up ones to try it with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mscnn_parts.decision import ACCEPTED, Decisions
from mscnn_parts.pictures import read_image

NOVEL_SHARE = 0.01  # of the calibration images is called like nothing known: the price of noticing what is
OWN_SHARE = 0.0025  # of them, by the texture alone, and by the detail alone
FEW_IMAGES = 1000  # below this number a quantile of a hundredth is a matter of chance
FEW_SHARE = 0.0005  # then, of the sum, whose tail is the heaviest; what is grossly strange shows in the other two


class Known(NamedTuple):
    """What images of the categories look like, to notice what looks like none of them; all float64."""

    texture_mean: np.ndarray  # (T,), of the train images
    texture_precision: np.ndarray  # (T, T), the inverse of the texture's covariance
    detail_mean: np.ndarray  # (D,), and
    detail_precision: np.ndarray  # (D, D), the same of the detail
    scale: np.ndarray  # (2, 4): mean and standard deviation of each sign on the calibration split
    limits: np.ndarray  # (3,): above which an image is like nothing known: of the sum, the texture, the detail


def signs_of_novelty(
    logits: np.ndarray, odds: np.ndarray, texture: np.ndarray, detail: np.ndarray, known: Known
) -> np.ndarray:
    """Four signs that an image belongs to no category at all, float64 (B, 4); each grows with its strangeness.

    That no category speaks up: the energy of Stage 1's logits (Liu et al. 2020). That both stages doubt: the log-odds
    of a wrong answer. That Stage 1's first block, which sees edges and colours, sees others than usual: log squared
    Mahalanobis distance to the mean of the train images (Lee et al. 2018 use it for every layer and category). That
    the image has more or less detail than usual: the same distance of the whitening filters' log strengths, which
    fall without end where an image is flat.

    Args:
        logits: Stage 1's mean over the views, (B, C). odds: of the confidence, (B,). texture, detail: see `Views`.
    """
    energy = -np.logaddexp.reduce(logits.astype(np.float64), axis=1)  # (B,)
    unusual = _log_distance(texture, known.texture_mean, known.texture_precision)
    return np.stack([energy, -odds, unusual, _log_distance(detail, known.detail_mean, known.detail_precision)], axis=1)


def _log_distance(features: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Log squared Mahalanobis distance of features (B, K), float64 (B,)."""
    shifted = features - mean  # (B, K)
    # By einsum, without BLAS, whose threads would compete with TensorFlow's: a matrix product here took 20 ms, not 1.
    return np.log(np.maximum((np.einsum("bk,kl->bl", shifted, precision) * shifted).sum(axis=1), 1e-12))


def novelty(signs: np.ndarray, known: Known) -> np.ndarray:
    """How strange images are, float64 (B,): a score for out-of-distribution detection, above 0 too strange.

    The sum of the first three standardised signs less its limit. The texture counts only where it is stranger than the
    mean: a usual one is no sign of a known category, since nearly all photographs have it. Texture and detail have
    limits of their own, too: on noise the stages may be as confident as never before, and would outvote them. Only
    beyond such a limit does its excess replace the sum, if it is larger; so the order of all other images is the sum's.
    NaN where nothing is known.

    Args:
        signs: (B, 4), see `signs_of_novelty`.
    """
    above = _parts_of_novelty(signs, known) - known.limits  # (B, 3)
    own = above[:, 1:].max(axis=1)
    return np.where(own > 0, np.maximum(above[:, 0], own), above[:, 0])


def _parts_of_novelty(signs: np.ndarray, known: Known) -> np.ndarray:
    """What the limits are held against, float64 (B, 3): the sum, the texture and the detail, standardised."""
    mean, deviation = known.scale
    energy, doubt, texture, detail = ((signs - mean) / deviation).T  # (B,) each
    return np.stack([energy + doubt + np.maximum(0, texture), texture, detail], axis=1)


def known_features(texture: np.ndarray, detail: np.ndarray) -> Known:
    """What is known of train images from texture (N, T) and detail (N, D): not yet scale and limits, see `known_scale`.

    Covariances are shrunk (Ledoit and Wolf 2004), for few images.
    """
    from sklearn.covariance import LedoitWolf

    found = []
    for features in (texture, detail):
        covariance = LedoitWolf(store_precision=False).fit(features).covariance_
        some = 1e-6 * max(np.trace(covariance), 1e-6) * np.eye(len(covariance))  # for channels that are always 0
        found += [features.mean(axis=0, dtype=float), np.linalg.inv(covariance + some)]
    return Known(*found, scale=np.full((2, 4), np.nan), limits=np.full(3, np.nan))


def known_scale(known: Known, signs: np.ndarray) -> Known:
    """Returns `known` with scale and limits fitted on the signs (N, 4) of calibration images.

    NOVEL_SHARE of the images lie beyond a limit: OWN_SHARE beyond that of the texture, as many beyond that of the
    detail, and so many beyond that of the sum that all make up the share. Fewer than FEW_IMAGES tell little of their
    own tails: then one image at most lies beyond a limit, that of the sum, and no limit is below the bound that the
    next image of a normal distribution exceeds with a probability of OWN_SHARE, or FEW_SHARE for the sum (its
    prediction interval, Student's t).
    """
    known = known._replace(scale=np.stack([signs.mean(axis=0), np.maximum(signs.std(axis=0), 1e-6)]))
    parts, count = _parts_of_novelty(signs, known), len(signs)  # (N, 3)
    few = count < FEW_IMAGES
    beyond, own = (1, 0) if few else (int(NOVEL_SHARE * count), int(OWN_SHARE * count))
    texture, detail = (_exceeded_by(own, values) for values in parts[:, 1:].T)
    usual = ~((parts[:, 1] > texture) | (parts[:, 2] > detail))  # all, where the features are not known yet: NaN
    limits = np.array([_exceeded_by(beyond - (~usual).sum(), parts[usual, 0]), texture, detail])
    if few and count > 1:
        shares = np.array([FEW_SHARE, OWN_SHARE, OWN_SHARE])
        limits = np.maximum(limits, _next_image_bound(parts, shares))
    return known._replace(limits=limits)


def _exceeded_by(count: int, values: np.ndarray) -> float:
    """The limit that `count` of the values exceed."""
    return float(np.sort(values)[::-1][min(count, len(values) - 1)])


def _next_image_bound(values: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The bound (K,) that the next row of normally distributed values (N, K) exceeds with a probability of `share`."""
    from scipy.stats import t

    factor = t.ppf(1 - share, len(values) - 1) * np.sqrt(1 + 1 / len(values))
    return values.mean(axis=0) + factor * values.std(axis=0, ddof=1)


def made_up_images(images: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Images that belong to no category, as many of each kind as are given: uint8 (B, H, W, channels).

    Args:
        images: some of the data set; what is scrambled are 16 patches of each. The first single colours are white,
            black and gray.
    """
    rng, (height, width) = np.random.default_rng(seed), images.shape[1:3]
    scrambled = images.copy()
    cut = scrambled[:, : height // 4 * 4, : width // 4 * 4]  # what four patches do not fill stays
    patches = cut.reshape(len(cut), 4, height // 4, 4, width // 4, -1).swapaxes(2, 3)  # (B, 4, 4, H/4, W/4, channels)
    flat = patches.reshape(len(cut), 16, *patches.shape[3:])
    colours = rng.integers(0, 256, (len(images), 1, 1, images.shape[-1]), dtype=np.uint8)
    colours[:3] = np.uint8([255, 0, 128])[: len(images), None, None, None]
    mixed = rng.permuted(np.broadcast_to(np.arange(16), (len(cut), 16)), axis=1)  # (B, 16)
    shuffled = np.take_along_axis(flat, mixed[:, :, None, None, None], axis=1).reshape(patches.shape)
    cut[...] = shuffled.swapaxes(2, 3).reshape(cut.shape)
    return {
        "uniform noise": rng.integers(0, 256, images.shape, dtype=np.uint8),
        "Gaussian noise": rng.normal(128, 64, images.shape).clip(0, 255).astype(np.uint8),
        "one colour": np.broadcast_to(colours, images.shape).copy(),
        "stripes": _stripes(images.shape, rng),
        "scrambled": scrambled,
    }


def _stripes(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Upright, level and slanting stripes of 1 to 8 pixels in two colours, uint8 of a shape (B, H, W, channels)."""
    count, height, width, channels = shape
    rows, columns = np.indices((height, width))
    across = np.stack([columns, rows, rows + columns])[np.arange(count) % 3]  # (B, H, W)
    odd = (across // rng.integers(1, 9, (count, 1, 1)) % 2).astype(bool)
    colours = rng.integers(0, 256, (2, count, 1, 1, channels), dtype=np.uint8)
    return np.where(odd[..., None], *colours)


def foreign_photographs(input_shape: Sequence[int]) -> np.ndarray:
    """The two photographs that come with scikit-learn, a temple and a flower, shrunk whole as `read_image` does it.

    Returns:
        uint8 (2, H, W, channels).
    """
    from importlib.resources import as_file, files

    found = []
    for name in ("china.jpg", "flower.jpg"):
        with as_file(files("sklearn.datasets.images") / name) as path:
            found.append(read_image(path, input_shape))
    return np.stack(found)


def unnoticed(verdicts: dict[str, Decisions], share: float = 0.05) -> dict[str, float]:
    """The kinds of images of no category of which more than `share` is accepted, and how many are: 0 to 1."""
    accepted = {kind: float((found.reasons() == ACCEPTED).mean()) for kind, found in verdicts.items()}
    return {kind: one for kind, one in accepted.items() if one > share}
