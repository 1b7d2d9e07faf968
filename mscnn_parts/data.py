"""A data set in four splits, and light mode."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mscnn_parts.files import digest_of, in_chunks
from mscnn_parts.on_disk import indexed, is_large, is_on_disk, joined
from mscnn_parts.settings import OTHER, MSCNNError

IMAGE_SIZE = 32  # pixels, if nothing else is asked for; images are resized when they are loaded


class Split(NamedTuple):
    """Images uint8 (N, H, W, channels) and labels int64 (N,).

    `IndexedRows` stand in for the array of images that are too many for memory, or for a copy.
    """

    images: np.ndarray
    labels: np.ndarray

    def __repr__(self) -> str:
        return f"<Split of {len(self.labels):,} images>"

    def __len__(self) -> int:  # of images, where a tuple would count its two fields
        return len(self.labels)

    def take(self, indices: np.ndarray) -> Split:
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, repr=False)
class Dataset:
    """A data set in four splits.

    train: what training sees. calibration: choices (epochs, thresholds, roll-back). certification: only
    for a certificate. test: only for the last number.
    """

    name: str
    source: str
    category_names: tuple[str, ...]
    train: Split
    calibration: Split
    certification: Split
    test: Split
    flip: bool = True  # whether a mirrored image keeps its category (a digit does not)
    quarter_turns: bool = False  # whether training turns images by quarters
    fallback: bool = False
    light_mode: bool = False
    seed: int = 0  # of the splits
    source_fingerprint: str = ""  # of the data as it was found, whatever the seed and light_mode
    image_size: int = 0  # pixels to which Stage 1 enlarges its images; 0: as they are

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {size:,}" for name, size in self.sizes.items())
        return f"<Dataset {self.name}: {sizes}; {len(self.category_names)} categories of {self.input_shape}>"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return self.train.images.shape[1:]

    @property
    def sizes(self) -> dict[str, int]:
        """Images of each split."""
        return {name: len(getattr(self, name)) for name in ("train", "calibration", "certification", "test")}

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every image and label of every split, in order."""
        splits = (self.train, self.calibration, self.certification, self.test)
        return digest_of(self.category_names, *(array for split in splits for array in split))

    def channel_statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the train split, (channels,) each, of pixels in 0..255."""
        counts = np.zeros((self.input_shape[-1], 256), np.int64)
        for chunk in in_chunks(self.train.images):
            channels = np.moveaxis(np.asarray(chunk), -1, 0)
            counts += [np.bincount(channel.ravel(), minlength=256) for channel in channels]
        levels, share = np.arange(256), counts / counts.sum(axis=1, keepdims=True)  # (channels, 256)
        mean = share @ levels
        return mean, np.sqrt(np.maximum(share @ levels**2 - mean**2, 1.0))

    def describe(self) -> dict:
        """What `metrics.json` says of the data."""
        return {
            "name": self.name, "source": self.source, "fallback": self.fallback, "fingerprint": self.fingerprint,
            "source_fingerprint": self.source_fingerprint,
            "light_mode": self.light_mode, "category_names": list(self.category_names), "sizes": self.sizes,
        }  # fmt: skip


@dataclass
class RawData:
    """A data set as it was found: uint8 images, integer labels, and no test split if there is none."""

    name: str
    source: str
    names: Sequence[str]
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    x_held: np.ndarray | None = None  # of a validation split: for calibration and certification
    y_held: np.ndarray | None = None
    flip: bool = True
    published: str = ""  # hashes that were checked and stand for the images, where there are such

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the published hashes, or over every image and label."""
        if self.published:
            return digest_of([*self.names, self.published])
        labels = [y.astype(np.int64) for y in (self.y_train, self.y_test, self.y_held) if y is not None]
        return digest_of(self.names, *labels, *(x for x in (self.x_train, self.x_test, self.x_held) if x is not None))


def _resized(images: np.ndarray, size: int, copied: bool) -> np.ndarray:
    """uint8 (N, h, w, channels) -> (N, size, size, channels), in chunks; of that size already, a copy or itself."""
    if images.shape[1:3] == (size, size):
        return np.array(images) if copied else images  # a view would keep alive what it is a part of
    import tensorflow as tf

    resized = np.empty((len(images), size, size, images.shape[-1]), np.uint8)
    done = 0
    for chunk in in_chunks(images):
        smaller = tf.image.resize(chunk, (size, size), antialias=True)
        resized[done : done + len(chunk)] = np.clip(np.round(smaller), 0, 255)
        done += len(chunk)
    return resized


LIGHT_MODE_MINIMUM = (1500, 300, 500)  # light mode keeps at least so many train, test and validation images
LEAST = 4  # images of a category: two to train on, one each for calibration and certification


def split_data(raw: RawData, light_mode: bool, seed: int, size: int = IMAGE_SIZE) -> Dataset:
    """Stratified, seeded splits: 90 % train, 5 % calibration, 5 % certification, and the test images.

    A small data set gives up to 15 % (at most 250 images) to each of calibration and certification, since
    a calibration on a handful of images is worth nothing. Without test images a fifth is set aside. A validation split
    of the data's own is halved for calibration and certification, and train stays whole.

    Args:
        size: pixels that a network wants. Smaller images are kept small, but for those below IMAGE_SIZE.
    """
    least = LEAST if raw.x_held is None else 2
    _check_categories(raw, least + (raw.x_test is None))
    source_fingerprint = raw.fingerprint
    # Splits of splits are only indexed: no image is copied before the last ones are known.
    train = Split(indexed(raw.x_train), raw.y_train.astype(np.int64))
    if raw.x_test is None or raw.y_test is None:
        train, test = _stratified_split(train, round(0.2 * len(train)), seed, (least, 1))
    else:
        test = Split(indexed(raw.x_test), raw.y_test.astype(np.int64))
    rest = None
    if raw.x_held is not None and raw.y_held is not None:
        rest = Split(indexed(raw.x_held), raw.y_held.astype(np.int64))

    def tenth(split: Split, floor: int, few: int) -> Split:
        enough = light_mode and len(split) >= floor + len(raw.names)
        return _stratified_split(split, max(len(split) // 10, floor), seed, (0, few))[1] if enough else split

    floors = LIGHT_MODE_MINIMUM
    train, test = tenth(train, floors[0], least), tenth(test, floors[1], 1)
    rest = rest and tenth(rest, floors[2], 2)
    if rest is None:
        held = max(round(0.05 * len(train)), min(250, round(0.15 * len(train))))
        train, rest = _stratified_split(train, 2 * held, seed, (2, 2))
    else:
        held = len(rest) // 2
    calibration, certification = _stratified_split(rest, held, seed)
    side = min(size, max(IMAGE_SIZE, *train.images.shape[1:3]))
    splits = train, calibration, certification, test
    # All or none, since a training joins two of them. A tenth of what is in memory does not keep the rest alive.
    copied = not any(map(is_on_disk if light_mode else is_large, [split.images for split in splits]))
    splits = [Split(_resized(split.images, side, copied), split.labels) for split in splits]
    return Dataset(
        raw.name,
        raw.source,
        tuple(raw.names),
        *splits,
        flip=raw.flip,
        light_mode=light_mode,
        seed=seed,
        source_fingerprint=source_fingerprint,
        image_size=size,
    )


def _check_categories(raw: RawData, least: int) -> None:
    """Raises MSCNNError unless the categories have names that can be told apart, and `least` images or more."""
    names = list(raw.names)
    unfit = [name for name in names if names.count(name) > 1 or name == OTHER or not name.strip()]
    if len(names) < 2 or unfit:
        raise MSCNNError(
            f"Categories are {', '.join(names)}{f' (here {unfit[0]!r})' if unfit else ''}: "
            f"use two or more different names, none of them {OTHER} or blank."
        )
    counts = np.bincount(raw.y_train, minlength=len(names))
    few = [f"{names[category]} ({counts[category]})" for category in np.flatnonzero(counts < least)]
    if few:
        more = f" and {len(few) - 5} more" if len(few) > 5 else ""
        raise MSCNNError(
            f"Too few images: the splits take {least} or more of each category, and the smallest of these has "
            f"{counts.min()}: {', '.join(few[:5])}{more}. Add images, or take the category out."
        )


def _stratified_split(split: Split, count: int, seed: int, least: tuple[int, int] = (1, 1)) -> tuple[Split, Split]:
    """Sets `count` images aside, every category in proportion, but `least` of each are kept and set aside.

    Where scikit-learn does not leave so many, each category is divided by itself, and somewhat more or fewer than
    `count` are set aside.
    """
    from sklearn.model_selection import train_test_split

    present, sizes = np.unique(split.labels, return_counts=True)
    if sizes.min() < sum(least):
        raise MSCNNError(
            f"Too few images: {count} of {len(split)} are to be set aside, some of each of the {len(present)} "
            f"categories, and the smallest of these has {sizes.min()}: give more images, or no light_mode."
        )
    everything, aside = np.arange(len(split)), np.empty(0, int)
    with contextlib.suppress(ValueError):  # it refuses a category of one image
        _, aside = train_test_split(everything, test_size=count, stratify=split.labels, random_state=seed)
    apart = np.array([(split.labels[aside] == category).sum() for category in present])
    if (apart < least[1]).any() or (sizes - apart < least[0]).any():
        order = np.random.default_rng(seed).permutation(len(split))
        apart = np.clip(np.round(sizes * count / len(split)).astype(int), least[1], sizes - least[0])
        own = zip(present, apart, strict=True)
        aside = np.concatenate([order[split.labels[order] == category][:number] for category, number in own])
    return split.take(np.setdiff1d(everything, aside)), split.take(np.sort(aside))


def train_and_calibration(data: Dataset) -> Split:
    """Train and calibration split as one, in this order: all that a training looks at."""
    return Split(
        joined(data.train.images, data.calibration.images), np.concatenate([data.train.labels, data.calibration.labels])
    )
