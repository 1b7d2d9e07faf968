"""The Keras model: both stages, their calibration, and what decides."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.checks import checked_labels
from mscnn_parts.data import Dataset, Split
from mscnn_parts.decision import (
    Decisions,
    Stage1Outputs,
    StageScores,
    decide_on,
    fit_category_calibration,
    fit_shared_calibration,
)
from mscnn_parts.files import write_atomically
from mscnn_parts.inference import Networks, validated_images
from mscnn_parts.layers import log_odds_tensor, serializable
from mscnn_parts.model_files import (
    FORMAT,
    check_assignable,
    check_free,
    check_keras,
    checked_network,
    checked_target,
    network_ids,
    parts_of,
    sha256_of,
    trainable_text,
)
from mscnn_parts.networks import (
    build_stages,
    fastest_policy,
    on_images,
    set_whitening,
    stage2_design,
    trunk_of,
    unnamed_branch,
)
from mscnn_parts.ood import OODStatistics, combine, fit_model_scale, ood_score
from mscnn_parts.pictures import Images
from mscnn_parts.settings import MSCNNError, categories_from
from mscnn_parts.thresholds import USER_SET, Certificate, checked_thresholds, guarantee_text, threshold_for_risk
from mscnn_parts.zoo import network_named


@serializable
class MultiStageCNN(keras.Model):
    """Stage 1, one Stage 2 CNN per category, their base network and the calibration: all that a decision needs.

    Args:
        category_names: (C,).
        image_shape: (H, W, channels) of the uint8 images.
        mean, std: of each channel of the train split, in pixel values 0..255.
        flip: whether a mirrored image keeps its category. If so, training mirrors images, and a decision looks at
            the image and its mirror image.
        dataset, data_fingerprint: name and fingerprint of the data set the model is trained on.
        threshold: confidence below which an image is OTHER. threshold_source: how it was chosen, in words.
        policy: Keras dtype policy of the convolutions.
        network: of Stage 1, a name from `NETWORKS`; or one's own, from float32 images (B, size, size, channels) of 0 to
            255 to logits (B, C), of a class that is registered with Keras.
        image_size: pixels to which Stage 1 enlarges its images; 0: as they are.
        stage2_branch: how many blocks of the Stage 2 base network its Stage 2 networks share; 0: none, each is a whole
            CNN; -1: the network's default: all blocks but the last, or a head on Stage 1's features if it has ImageNet
            weights.
        quarter_turns: whether training turns images, by 0 to 3 quarters.
        certificate: the fields of a `Certificate`, if one was given; see `certify`.
        source_fingerprint: that of the data set before light mode and splitting. light_mode, seed: of the splits.
        format: of the model file, which `load_model` has checked.

    The Stage 2 base network is a CNN of Stage 2's shape trained on all categories: every Stage 2 CNN starts as a copy
    of its layers behind the shared blocks. It is kept so that a category can be started again.
    """

    def __init__(
        self,
        category_names: Sequence[str],
        image_shape: Sequence[int],
        mean: Sequence[float] | np.ndarray,
        std: Sequence[float] | np.ndarray,
        flip: bool = True,
        dataset: str = "",
        data_fingerprint: str = "",
        threshold: float = 0.7,
        threshold_source: str = USER_SET,
        policy: str = "float32",
        network: str | keras.Model = "compact",
        image_size: int = 0,
        stage2_branch: int = -1,
        stage1_widths: Sequence[int] = (),
        stage2_widths: Sequence[int] = (),
        logit_scale: float = 0.25,
        activation: str = "relu",
        certificate: Sequence | None = None,
        source_fingerprint: str = "",
        light_mode: bool = False,
        seed: int = 0,
        quarter_turns: bool = False,
        format: int = FORMAT,
        **kwargs,
    ):
        check_keras()
        super().__init__(**kwargs)
        image_size, network = image_size or image_shape[0], checked_network(network)
        blocks, stage2_branch = stage2_design(network, image_size, stage2_widths, stage2_branch)
        self._settings = {
            "category_names": list(category_names), "image_shape": list(image_shape),
            "mean": [float(m) for m in mean], "std": [float(s) for s in std], "flip": flip, "dataset": dataset,
            "data_fingerprint": data_fingerprint, "source_fingerprint": source_fingerprint, "policy": policy,
            "network": network, "image_size": image_size, "stage2_branch": stage2_branch,
            "stage1_widths": list(stage1_widths), "stage2_widths": list(stage2_widths), "logit_scale": logit_scale,
            "activation": activation, "light_mode": light_mode, "seed": seed, "quarter_turns": quarter_turns,
        }  # fmt: skip
        self.category_names = tuple(category_names)
        self.image_shape, self.dataset, self.policy = tuple(image_shape), dataset, policy
        self.flip, self.quarter_turns = flip, quarter_turns
        self.threshold, self.threshold_source = threshold, threshold_source  # in this order: see the setter
        self.certificate = Certificate(*certificate) if certificate else None
        self.data_fingerprint, count = data_fingerprint, len(self.category_names)
        self.stage1, self.stage2_base, self.build_stage2 = build_stages(
            network, stage2_branch, stage1_widths, blocks, logit_scale, activation, input_shape=image_shape,
            categories=count, mean=mean, std=std, flip=flip, policy=policy, size=image_size,
            quarter_turns=quarter_turns,
        )  # fmt: skip
        self.network, self.image_size = network if isinstance(network, str) else "own", image_size
        self.stage2_branch = stage2_branch
        self.stage2 = {name: self.build_stage2(name=name) for name in map(_category_key, range(count))}
        self.shared_coefficients = self._unset_weight("shared_coefficients", (3,))
        self.calibration_coefficients = self._unset_weight("calibration_coefficients", (count, 3))
        channels, filters = self.stage1.get_layer("block1").output.shape[-1], 4 * image_shape[-1]  # of the whitening
        shapes = [(channels,), (channels, channels), (filters,), (filters, filters), (2, 4), (3,)]
        self._ood_statistics = [self._unset_weight(*one) for one in zip(OODStatistics._fields, shapes, strict=True)]
        self.network_ids = network_ids(self)
        self.built = True

    def _unset_weight(self, name: str, shape: tuple[int, ...]):
        """A weight that is not a number until it is fitted, so that an uncalibrated model is noticed."""
        unset = keras.initializers.Constant(np.nan)
        return self.add_weight(shape, unset, name=name, dtype="float64", trainable=False, autocast=False)

    def __setattr__(self, name, value):
        if "network_ids" in self.__dict__:  # all is built
            check_assignable(name)
        super().__setattr__(name, value)

    @classmethod
    def for_dataset(
        cls,
        data: Dataset,
        policy: str | None = None,
        seed: int = 0,
        network: str | keras.Model = "compact",
        weights: str | None = "imagenet",
        **settings,
    ) -> MultiStageCNN:
        """A new model for a data set: its input statistics and whitening from the train split.

        Args:
            weights: None: random ones also where the network has some from ImageNet.
        """
        keras.utils.set_random_seed(seed)
        pretrained = network_named(network).pretrained
        policy = policy or ("float32" if pretrained else fastest_policy())  # fine-tuning was measured in float32 alone
        mean, std = data.channel_statistics()
        model = cls(
            data.category_names, data.input_shape, mean, std, data.flip, data.name, data.fingerprint,
            policy=policy, source_fingerprint=data.source_fingerprint, light_mode=data.light_mode, seed=data.seed,
            network=network, image_size=data.image_size, quarter_turns=data.quarter_turns, **settings,
        )  # fmt: skip
        if weights not in (None, "imagenet"):
            raise MSCNNError(f"weights is {weights!r}: give 'imagenet', or None for random ones.")
        if weights and pretrained:
            network_named(network).load_weights(model.stage1)
        set_whitening([model.stage1, model.stage2_base, *model.stage2.values()], data.train.images, mean, std)
        return model

    def get_config(self):
        certificate = None if self.certificate is None else list(self.certificate)
        chosen = {"threshold": np.asarray(self.threshold).tolist(), "threshold_source": self.threshold_source}
        network = self._settings["network"]
        network = network if isinstance(network, str) else keras.saving.serialize_keras_object(network)
        return {"format": FORMAT, **self._settings, "network": network, **chosen, "certificate": certificate}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        return super().from_config({"stage2_branch": unnamed_branch(config.get("network")), **config}, custom_objects)

    def stage2_cnn(self, category: int) -> keras.Model:
        """The Stage 2 CNN of a category: uint8 (B, H, W, channels), or the trunk's features -> logits (B, C)."""
        return self.stage2[_category_key(category)]

    def verifier(self, category: int) -> keras.Model:
        """The Stage 2 CNN of a category as one from uint8 images (B, H, W, channels), with a copy of what all share."""
        return on_images(self.stage1, self.stage2_base, self.stage2_cnn(category))

    @property
    def is_calibrated(self) -> bool:
        return bool(np.isfinite(self.calibration_coefficients.numpy()).all())

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each part, so that anyone can check what a training has left untouched."""
        return {name: sha256_of(arrays) for name, arrays in parts_of(self).items()}

    # ---- freezing

    def set_stage1_trainable(self, flag: bool = True) -> None:
        """Frozen (False): training moves no weight and no BatchNormalization statistic of Stage 1."""
        self.stage1.trainable = bool(flag)

    def set_stage2_category_trainable(self, categories: str | int | Iterable = "", flag: bool = True) -> None:
        """Freezes or frees the Stage 2 CNNs (and calibration coefficients) of the given categories; '' means all."""
        for category in categories_from(categories, self.category_names):
            self.stage2_cnn(category).trainable = bool(flag)

    def train_only(self, categories: str | int | Iterable) -> None:
        """Freezes everything but the Stage 2 CNNs of the given categories."""
        self.set_stage1_trainable(False)
        self.stage2_base.trainable = False
        self.set_stage2_category_trainable("", False)
        self.set_stage2_category_trainable(categories, True)

    def trainable_categories(self) -> tuple[int, ...]:
        return tuple(c for c in range(len(self.category_names)) if self.stage2_cnn(c).trainable)

    def trainable_summary(self) -> str:
        """What is trainable, printable: `✓ ship: True   ✗ cat: False`."""
        return trainable_text(self)

    # ---- forward

    def call(self, images, training=False):
        """uint8 (B, H, W, channels) -> {"stage1": logits (B, C), "stage2": log-odds of each category (B, C)}.

        One view of each image; `decide` lets both stages score the mirror image, too.
        """
        seen = self.trunk(images, training=False) if self.trunk else images
        stage2 = [log_odds_tensor(cnn(seen, training=training), c) for c, cnn in enumerate(self.stage2.values())]
        return {"stage1": self.stage1(images, training=training), "stage2": tf.stack(stage2, axis=1)}

    @functools.cached_property
    def trunk(self) -> keras.Model | None:
        """From images to the features that all Stage 2 networks see, which none of them trains; None: the images."""
        return trunk_of(self.stage1, self.stage2_base, self.stage2_branch)

    @functools.cached_property
    def _networks(self) -> Networks:
        return Networks(self.stage1, [*self.stage2.values()], self.trunk, views=2 if self.flip else 1)

    def stage1_logits(self, images: np.ndarray, batch_size: int = 512) -> np.ndarray:
        """Stage 1's logits, float32 (B, C), of uint8 images (B, H, W, channels), without its mirror image."""
        return self._networks.stage1_logits(validated_images(images, self.image_shape), batch_size)

    def stage1_outputs(self, images: np.ndarray, batch_size: int = 512) -> Stage1Outputs:
        """What Stage 1 makes of uint8 images (B, H, W, channels) and, if that keeps their category, mirrored ones."""
        return self._networks.stage1_outputs(validated_images(images, self.image_shape), batch_size)

    def stage2_log_odds(self, images: np.ndarray, category: int, batch_size: int = 512) -> np.ndarray:
        """Log-odds that the images show `category`, by its Stage 2 CNN: float64 (B,)."""
        return self._networks.stage2_log_odds(validated_images(images, self.image_shape), category, batch_size)

    def scores(self, images: Images, batch_size: int = 512) -> StageScores:
        """Both stages' scores of uint8 images (B, H, W, channels), not yet combined."""
        return self._networks.scores(validated_images(images, self.image_shape), batch_size)

    def decide(self, images: Images, threshold: float | np.ndarray | None = None, batch_size: int = 512) -> Decisions:
        """Decides on images: one of the categories 0..C-1, or C for OTHER.

        OTHER means that the confidence is below the threshold, or that the image is out of distribution, where a
        confidence may be high and mean little: it was calibrated on images of the categories.

        Args:
            images: uint8 (B, H, W, channels), or a path, a Pillow image or a list of these; see `read_image`.
            threshold: in place of the model's own; one for all, or one per category, (C,).

        Raises:
            MSCNNError: images or thresholds of another shape, or a model that is not calibrated yet.

        Example:
            >>> decisions = load_model("pretrained").decide(np.zeros((2, 32, 32, 3), np.uint8))
            >>> decisions.reasons().tolist()
            ['out of distribution', 'out of distribution']
        """
        if not self.is_calibrated:
            raise MSCNNError("Stage 2 is not trained and calibrated yet: run notebook 03_stage2_training first.")
        threshold = self.threshold if threshold is None else checked_thresholds(threshold, len(self.category_names))
        scores, statistics = self.scores(images, batch_size), self.ood_statistics
        log_odds, terms = combine(scores, self.calibration_coefficients.numpy(), statistics)
        return decide_on(scores, log_odds, ood_score(terms, statistics), threshold)

    # ---- calibration

    @property
    def ood_statistics(self) -> OODStatistics:
        """What images of the categories look like; NaN until `fit_ood`, scale and thresholds until `calibrate`."""
        return OODStatistics(*(variable.numpy() for variable in self._ood_statistics))

    @ood_statistics.setter
    def ood_statistics(self, statistics: OODStatistics) -> None:
        for variable, value in zip(self._ood_statistics, statistics, strict=True):
            variable.assign(value)

    def calibrate(self, split: Split, categories: Iterable[int] | None = None) -> None:
        """Fits calibration coefficients on the calibration split.

        Args:
            categories: fit only the coefficients of these, shrunk towards the shared ones as they are. None: fit those
                of all trainable categories and, if no category is frozen, the shared ones before them and the OOD
                thresholds after them.

        Raises:
            MSCNNError: a category is frozen.
        """
        free = self.trainable_categories()
        chosen = free if categories is None else tuple(categories)
        check_free(self, chosen)
        scores, coefficients = self.scores(split.images), self.calibration_coefficients.numpy()
        labels = checked_labels(scores.category, split.labels)
        self.certificate = None
        pair, correct = (scores.stage1, scores.stage2), scores.category == labels
        everything = categories is None and len(free) == len(self.category_names)
        if everything:
            self.shared_coefficients.assign(fit_shared_calibration(*pair, correct))
        if chosen:
            coefficients[list(chosen)] = fit_category_calibration(
                scores.category, *pair, correct, self.shared_coefficients.numpy(), chosen
            )
        self.calibration_coefficients.assign(coefficients)
        if everything:
            fit_model_scale(self, scores)

    def reset_calibration(self, categories: Iterable[int] | None = None) -> None:
        """Marks categories as not calibrated, since their Stage 2 CNNs have been trained; None: all of them."""
        self.certificate = None
        coefficients = self.calibration_coefficients.numpy()
        coefficients[slice(None) if categories is None else list(categories)] = np.nan
        self.calibration_coefficients.assign(coefficients)
        if categories is None:
            self.shared_coefficients.assign(np.full(3, np.nan))

    def certify(self, split: Split, risk: float, delta: float = 0.05) -> Certificate:
        """Sets a low threshold with a guaranteed error rate (see `threshold_for_risk`), and keeps the guarantee.

        It is one for the images that are not out of distribution; the others are OTHER anyway. Any training or
        calibration voids the guarantee.

        Args:
            split: the certification split, which nothing else has seen.

        Raises:
            MSCNNError: too few images, or the risk cannot be guaranteed; threshold and certificate stay as they were.
        """
        decisions = self.decide(split.images)
        labels, in_distribution = checked_labels(decisions.category, split.labels), decisions.in_distribution
        correct = decisions.stage1_category == labels
        certificate = threshold_for_risk(decisions.confidence[in_distribution], correct[in_distribution], risk, delta)
        self.certificate = certificate._replace(images=len(split))
        self.threshold, self.threshold_source = certificate.threshold, f"for at most {risk:.2%} errors"
        return self.certificate

    @property
    def threshold(self) -> float | np.ndarray:
        """Confidence below which an image is OTHER: one for all, or one per category, (C,).

        Setting it makes it one that was given.
        """
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | Sequence[float]) -> None:
        self._threshold = checked_thresholds(value, len(self.category_names))
        self.threshold_source = USER_SET

    @property
    def valid_certificate(self) -> Certificate | None:
        """The certificate, if it is for the model's threshold."""
        certified = self.certificate is not None and np.all(self.certificate.threshold == self.threshold)
        return self.certificate if certified else None

    def guarantee(self) -> str:
        """What is guaranteed of the model's decisions, printable in one line."""
        return guarantee_text(self.certificate, self.threshold)

    # ---- save, load

    def save(self, filepath: str | Path, overwrite: bool = True, **kwargs) -> None:
        """Saves the whole model as one `.keras` file, beside the old one first: a file is whole or the old one.

        Args:
            overwrite: whether a file that is there may be replaced; nobody is asked.

        Raises:
            MSCNNError: it may not, it cannot be written, or a network is not the model's own any more.
        """
        path = checked_target(self, filepath, overwrite)
        write_atomically(path, lambda partial: super(MultiStageCNN, self).save(partial, **kwargs))


def _category_key(category: int) -> str:
    return f"category_{category}"
