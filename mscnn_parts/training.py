"""Trains Stage 1, the Stage 2 base network and Stage 2, and retrains some categories."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.callbacks import EpochTimer, ProgressBar
from mscnn_parts.data import Dataset, train_and_calibration
from mscnn_parts.fitting import Trainer, compile_trainer, seed_training, train_classifier, validation_batch
from mscnn_parts.layers import LogOdds
from mscnn_parts.metrics import log_loss_by_category
from mscnn_parts.networks import sees_images, weights_behind
from mscnn_parts.ood import fit_ood
from mscnn_parts.optimizers import Recipe, stage2_optimizer
from mscnn_parts.settings import MSCNNError, Settings, categories_from
from mscnn_parts.transfer import features_of, release_features, train_head, train_in_phases
from mscnn_parts.zoo import network_named

if TYPE_CHECKING:
    from mscnn_parts.model import MultiStageCNN


def train_stage1(
    model: MultiStageCNN,
    data: Dataset,
    recipe: Recipe,
    seed: int = 0,
    log_dir: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> dict[str, list[float]]:
    """Trains Stage 1 where it stands, see `train_classifier` and `train_in_phases`, and fits the OOD statistics.

    What was calibrated to it is void.
    """
    if recipe.phases:
        history = train_in_phases(model.stage1, network_named(model.network), data, recipe, seed, log_dir, callbacks)
    else:
        history = train_classifier(model.stage1, data, recipe, seed, log_dir, callbacks)
    model.reset_calibration()
    fit_ood(model, data)
    return history


def train_stage2_base(
    model: MultiStageCNN, data: Dataset, recipe: Recipe, seed: int = 0, log_dir: str | Path | None = None
) -> dict[str, list[float]]:
    """Trains the Stage 2 base network, then makes every trainable Stage 2 CNN a copy of its layers.

    What was calibrated to these CNNs is void.

    Raises:
        MSCNNError: the base network is frozen, or a CNN that shares some of its layers.
    """
    own = dataclasses.replace(recipe, epochs=recipe.stage2_base_epochs or recipe.epochs)
    base, free = model.stage2_base, model.trainable_categories()
    if model.trunk and sees_images(base) and len(free) < len(model.category_names):
        raise MSCNNError(
            "All Stage 2 CNNs share blocks of the base network, which this training would move: free them all first, "
            "by set_stage2_category_trainable()."
        )
    if not sees_images(base):
        history = train_head(base, features_of(model, data, recipe.views), data, own, seed + 1)
    else:
        own = dataclasses.replace(own, optimizer="muon", label_smoothing=Recipe.label_smoothing)
        history = train_classifier(base, data, own, seed + 1, log_dir)
    for network in map(model.stage2_cnn, free):
        network.set_weights(weights_behind(base, network))
    model.reset_calibration(free)
    return history


def sample_hard_negatives(
    labels: np.ndarray, probability: np.ndarray, category: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Chooses what a Stage 2 CNN is trained on: in turn an image of its category and a hard one of another.

    Images of other categories are drawn in proportion to the square of `probability`, plus 0.00001: what Stage 1 would
    mistake for the category is what its verifier has to know. On its own train images Stage 1 is rarely mistaken.
    Without the square, the many images to which it gives a few hundredths would be nearly all of the draw.

    Args:
        labels: (N,). probability: Stage 1's probability of `category` for each image, (N,).
        count: how many indices to draw, with replacement; even positions hold the category.

    Returns:
        int64 (count,).
    """
    own = np.flatnonzero(labels == category)
    weight = np.where(labels == category, 0.0, probability**2 + 0.00001)
    indices = np.empty(count, np.int64)
    indices[0::2] = rng.choice(own, len(indices[0::2]))
    indices[1::2] = rng.choice(len(labels), len(indices[1::2]), p=weight / weight.sum())
    return indices


class Stage2Trainer:
    """Trains Stage 2 CNNs one after the other with one graph: weights are copied in and out.

    Args:
        model: only the Stage 2 CNNs that are trained change.
        data: train and calibration splits are used.
        recipe: its epochs scale the number of steps.
        trainer_class: what takes the steps.
    """

    HISTORY_POINTS = 5  # points of the history of each category

    def __init__(self, model: MultiStageCNN, data: Dataset, recipe: Recipe, trainer_class: type[Trainer] = Trainer):
        self.model, self.data = model, data
        self.batch_size = min(256, recipe.batch_size)
        images = recipe.stage2_fraction * recipe.epochs * len(data.train)
        self.steps = max(1, round(images / self.batch_size / self.HISTORY_POINTS))  # a round
        self.probability = np.asarray(tf.nn.softmax(model.stage1_logits(data.train.images)))  # (N, C)
        self.predicted = model.stage1_outputs(data.calibration.images).logits.mean(axis=0).argmax(axis=1)
        self.views, heads = 1, not sees_images(model.stage2_base)
        if model.trunk:
            features = features_of(model, data, recipe.views)
            (images, self.labels), self.views = features.with_labels(data), features.views
        else:
            images, self.labels = train_and_calibration(data)
        self.network = model.build_stage2(name="stage2")  # not a clone, which would be frozen where the base network is
        self.head = LogOdds()
        self.trainer = trainer_class(self.network, images, self.head)

        compile_trainer(
            self.trainer, stage2_optimizer(recipe, self.batch_size, self.steps * self.HISTORY_POINTS, heads),
            keras.losses.BinaryCrossentropy(from_logits=True),
            keras.metrics.BinaryAccuracy("accuracy", threshold=0.0), self.steps,
        )  # fmt: skip

    def train(self, category: int, start: keras.Model, seed: int) -> dict[str, list[float]]:
        """Trains one Stage 2 CNN from the weights of `start`; returns its history, a value per round."""
        timer = EpochTimer()
        seed_training(self.network, seed)
        self.network.set_weights(weights_behind(start, self.network))
        self.head.category.assign(category)
        for variable in self.trainer.optimizer.variables:  # momentum and step count of the category before
            variable.assign(tf.zeros_like(variable))
        at_once = validation_batch(self.network, self.batch_size)
        correct = np.float32(self.labels == category)  # (N,), 1 where it is correct to say `category`
        # In the calibration split the question is only asked where Stage 1 says `category`.
        asked = self.views * len(self.data.train) + np.flatnonzero(self.predicted == category)
        history = self.trainer.fit(
            self.trainer.batches(correct, self.batch_size, self._order(category, np.random.default_rng(seed))),
            epochs=self.HISTORY_POINTS, steps_per_epoch=self.steps, shuffle=False, verbose=0, callbacks=[timer],
            validation_data=self.trainer.batches(correct, at_once, asked) if len(asked) else None,
        ).history  # fmt: skip
        self.model.stage2_cnn(category).set_weights(self.network.get_weights())
        self.model.reset_calibration([category])
        return {**history, "seconds": timer.seconds}

    def _order(self, category: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of the train images of one whole training."""
        count = self.HISTORY_POINTS * self.steps * self.batch_size
        labels = self.data.train.labels
        indices = sample_hard_negatives(labels, self.probability[:, category], category, count, rng)
        return indices if self.views == 1 else indices + len(labels) * rng.integers(self.views, size=count)


def train_stage2(
    model: MultiStageCNN, data: Dataset, recipe: Recipe, seed: int = 0, start: str = "stage2_base"
) -> dict[str, dict[str, list[float]]]:
    """Trains the trainable Stage 2 CNNs: 'Stage 1 says c: is it correct?'

    Each CNN is fine-tuned by binary cross-entropy on its log-odds of c, on batches that are half images of c
    and half images that Stage 1 takes, or nearly takes, for c.

    Args:
        start: "stage2_base": begin with the Stage 2 base network's weights; "current": go on from the CNN as it is.

    Returns:
        A history for each category's name: loss, accuracy, val_loss, val_accuracy and seconds.
    """
    trainer, histories, categories = Stage2Trainer(model, data, recipe), {}, model.trainable_categories()
    release_features(model)  # the trainer has them, and ends here
    bar = ProgressBar("Stage 2", len(categories))
    for category in categories:
        begun, name = time.time(), model.category_names[category]
        network = model.stage2_base if start == "stage2_base" else model.stage2_cnn(category)
        histories[name] = history = trainer.train(category, network, seed + 100 + category)
        accuracy = f"accuracy {history['accuracy'][-1]:.3f}, loss {history['loss'][-1]:.3f}"
        print(f"Stage 2 {name}: {accuracy}, {time.time() - begun:.0f} s", flush=True)
        bar.advance(len(histories))
    return histories


def keeps_stage2(model: MultiStageCNN, settings: Settings) -> bool:
    """Whether notebook 03 leaves Stage 2 as it is: only some categories of a finished model are to be retrained."""
    only_some = len(categories_from(settings.stage2_categories, model.category_names)) < len(model.category_names)
    return settings.stage2_only and only_some and model.is_calibrated


class RetrainingResult(NamedTuple):
    """What became of one category; losses are mean log losses on the calibration split, in nats."""

    category: str
    loss_before: float
    loss_after: float
    kept: bool


def calibration_losses(model: MultiStageCNN, data: Dataset) -> np.ndarray:
    """Log loss of the confidences on the calibration split, by predicted category, (C,)."""
    decisions = model.decide(data.calibration.images)
    correct = decisions.stage1_category == data.calibration.labels
    return log_loss_by_category(decisions.stage1_category, decisions.confidence, correct, len(model.category_names))


def weakest_categories(model: MultiStageCNN, data: Dataset, count: int = 2) -> tuple[int, ...]:
    """The categories whose confidences fit worst on the calibration split."""
    losses = np.nan_to_num(calibration_losses(model, data), nan=-1.0)
    return tuple(sorted(np.argsort(-losses, kind="stable")[:count].tolist()))


def retrain_stage2(
    model: MultiStageCNN,
    data: Dataset,
    categories: str | int | Iterable,
    recipe: Recipe,
    seed: int = 0,
    start: str = "current",
    keep_worse: bool = False,
) -> tuple[list[RetrainingResult], dict[str, dict[str, list[float]]]]:
    """Retrains the Stage 2 CNNs and calibration coefficients of some categories; all else stays bit for bit.

    So do the limits of what is out of distribution: with other confidences in the chosen categories, somewhat more or
    less than one in a hundred of their images may now be beyond them.

    A category whose log loss on the calibration split did not fall is rolled back as it was, unless
    `keep_worse`. Everything but the chosen categories is left frozen.

    Returns:
        One `RetrainingResult` a chosen category, and the histories.
    """
    chosen = categories_from(categories, model.category_names)
    before = {c: (model.stage2_cnn(c).get_weights(), model.calibration_coefficients.numpy()[c]) for c in chosen}
    losses = calibration_losses(model, data)
    model.train_only(chosen)
    histories = train_stage2(model, data, recipe, seed, start)
    model.calibrate(data.calibration, chosen)
    new_losses, results = calibration_losses(model, data), []
    coefficients = model.calibration_coefficients.numpy()
    for c in chosen:
        kept = keep_worse or bool(new_losses[c] < losses[c])
        if not kept:
            weights, coefficients[c] = before[c]
            model.stage2_cnn(c).set_weights(weights)
        results.append(RetrainingResult(model.category_names[c], losses[c], new_losses[c], kept))
    model.calibration_coefficients.assign(coefficients)
    return results, histories
