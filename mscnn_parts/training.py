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

from mscnn_parts.callbacks import (
    AlternatingFlip,
    EpochTimer,
    ProgressBar,
    ProgressiveCrops,
    RestoreBestWeights,
    ShowProgress,
    in_notebook,
)
from mscnn_parts.data import Dataset, train_and_calibration
from mscnn_parts.layers import LogOdds
from mscnn_parts.metrics import log_loss_by_category
from mscnn_parts.ood import fit_ood
from mscnn_parts.optimizers import Recipe, stage1_optimizer, stage2_optimizer
from mscnn_parts.settings import MSCNNError, Settings, categories_from

if TYPE_CHECKING:
    from mscnn_helpers import MultiStageCNN


def batches(
    labels: np.ndarray, batch_size: int, order: np.ndarray | None = None, shuffle_seed: int | None = None
) -> tf.data.Dataset:
    """Batches for `fit` of a `Trainer`: indices int64 (B,) and labels (B, ...).

    tf.data's autotuning is off: nothing is left for it to tune, and ending its thread was seen to take 16 s at the end
    of a 24 s epoch (TensorFlow 2.21, on CPU).

    Args:
        labels: of all images, (N, ...), of any dtype.
        order: indices int64 in the order wanted, with repetitions if need be; None: each image once.
        shuffle_seed: shuffles the indices anew in every epoch; None: as they are.
    """
    with tf.device("CPU"):  # where tf.data works
        labels = tf.convert_to_tensor(labels)
    indices = tf.data.Dataset.from_tensor_slices(np.arange(len(labels)) if order is None else order)
    if shuffle_seed is not None:
        indices = indices.shuffle(len(indices), seed=shuffle_seed)

    @tf.autograph.experimental.do_not_convert
    def look_up(index):
        return index, tf.gather(labels, index)

    options = tf.data.Options()
    options.autotune.enabled = False
    return indices.batch(batch_size).map(look_up).prefetch(2).with_options(options)


def _seed(network: keras.Model, seed: int) -> None:
    """Seeds all that is random in a training: Python, NumPy, TensorFlow (shuffling), and the augmentation."""
    keras.utils.set_random_seed(seed)
    network.get_layer("augmentation").reseed(seed)


def steps_per_execution(epoch: int) -> int:
    """How many training steps `fit` takes in one call of a graph: on a GPU all those of an epoch, on CPU one.

    A GPU takes a step in milliseconds, so that Python between two steps would cost as much. On CPU it costs little,
    and single steps can be interrupted. The trained weights are the same but for rounding.
    """
    return epoch if tf.config.list_physical_devices("GPU") else 1


class Trainer(keras.Model):
    """A network with the images of its training, which lie on the device that computes: for `fit` on their indices.

    Optimizer and metrics end here, not in the network's model file. A callback's `self.model` is a Trainer: `predict`
    also takes images, and `save` saves the network.

    Args:
        network: its layers are trained.
        images: uint8 (N, H, W, channels). A variable holds them, for on a GPU TensorFlow gathers uint8 from nothing
            else; it is no weight.
        head: a layer for what the network says; None: nothing is done with it.
    """

    def __init__(self, network: keras.Model, images: np.ndarray, head: keras.layers.Layer | None = None):
        super().__init__()
        self.network, self.head = network, head or keras.layers.Identity()
        self.images = tf.Variable(images, trainable=False)
        self.built = True  # the network is

    def call(self, inputs, training=False):
        """Indices int64 (B,), or images uint8 (B, H, W, channels) -> what the head makes of the network's output."""
        images = tf.gather(self.images, inputs) if len(inputs.shape) == 1 else inputs
        return self.head(self.network(images, training=training))

    def save(self, filepath: str | Path, **kwargs) -> None:
        self.network.save(filepath, **kwargs)

    def save_weights(self, filepath: str | Path, **kwargs) -> None:
        self.network.save_weights(filepath, **kwargs)


def compile_classifier(
    model: keras.Model, recipe: Recipe, steps: int, optimizer: keras.optimizers.Optimizer | None = None
) -> keras.Model:
    """Compiles a model for training by the recipe, and returns it.

    Args:
        steps: of the whole training, over which the learning rate rises and falls.
        optimizer: in place of the recipe's.
    """
    model.compile(
        optimizer or stage1_optimizer(recipe, steps),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        metrics=["accuracy"],
        jit_compile=False,  # XLA was slower on CPU wherever it was measured; on GPU it has not been tried
        steps_per_execution=steps_per_execution(steps // recipe.epochs),
    )
    return model


def train_classifier(
    network: keras.Model,
    data: Dataset,
    recipe: Recipe,
    seed: int = 0,
    log_dir: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    trainer_class: type[Trainer] = Trainer,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> dict[str, list[float]]:
    """Trains a CNN on all categories of the train split, by `fit`; Stage 1 and the Stage 2 base network.

    Args:
        log_dir: folder for TensorBoard logs; None: none are written.
        callbacks: more of Keras' callbacks; their `model` is a `Trainer`.
        trainer_class: what takes the steps. optimizer: in place of the recipe's.

    Returns:
        The history: lists of loss, accuracy, val_loss, val_accuracy (val: calibration split) and seconds, one
        value per epoch.

    Raises:
        MSCNNError: the network is frozen.
    """
    if not network.trainable:
        raise MSCNNError(f"{network.name} is frozen: set its trainable to True, or leave stage2_only off.")
    _seed(network, seed)
    both = train_and_calibration(data)
    one_hot = keras.utils.to_categorical(both.labels, len(data.category_names))
    train, calibration = np.split(np.arange(len(both)), [len(data.train)])
    steps = -(-len(train) // recipe.batch_size) * recipe.epochs
    trainer = compile_classifier(trainer_class(network, both.images), recipe, steps, optimizer)
    del both  # the trainer has its own copy
    augmentation, timer = network.get_layer("augmentation"), EpochTimer()
    by_epoch = [AlternatingFlip(augmentation), ProgressiveCrops(augmentation, int(recipe.small_crops * recipe.epochs))]
    logs = [keras.callbacks.TensorBoard(log_dir)] if log_dir else []
    title = network.name.replace("_", " ").replace("stage", "Stage ")
    progress = [ShowProgress(title)] if in_notebook() else []  # a hook after each step is not free
    try:
        history = trainer.fit(
            batches(one_hot, recipe.batch_size, train, seed), epochs=recipe.epochs, shuffle=False, verbose=2,
            validation_data=batches(one_hot, 500, calibration),
            callbacks=[timer, *by_epoch, *callbacks, RestoreBestWeights(), *progress, *logs],
        )  # fmt: skip
    finally:  # also of a training that was interrupted
        augmentation.reset()
    return {**history.history, "seconds": timer.seconds}


def train_stage1(
    model: MultiStageCNN,
    data: Dataset,
    recipe: Recipe,
    seed: int = 0,
    log_dir: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> dict[str, list[float]]:
    """Trains Stage 1 where it stands, see `train_classifier`, and fits the OOD statistics.

    What was calibrated to it is void.
    """
    history = train_classifier(model.stage1, data, recipe, seed, log_dir, callbacks)
    model.reset_calibration()
    fit_ood(model, data)
    return history


def train_stage2_base(
    model: MultiStageCNN, data: Dataset, recipe: Recipe, seed: int = 0, log_dir: str | Path | None = None
) -> dict[str, list[float]]:
    """Trains the Stage 2 base network, then makes every trainable Stage 2 CNN a copy of it."""
    own = dataclasses.replace(recipe, epochs=recipe.stage2_base_epochs or recipe.epochs)
    history = train_classifier(model.stage2_base, data, own, seed + 1, log_dir)
    for category in model.trainable_categories():
        model.stage2_cnn(category).set_weights(model.stage2_base.get_weights())
    model.reset_calibration(model.trainable_categories())
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
        images, self.labels = train_and_calibration(data)
        self.network = model.build_stage2()  # not a clone, which would be frozen where the Stage 2 base network is
        self.head = LogOdds()
        self.trainer = trainer_class(self.network, images, self.head)

        def accuracy(correct, log_odds):
            return tf.cast((log_odds > 0) == (correct > 0.5), tf.float32)

        self.trainer.compile(
            stage2_optimizer(recipe, self.batch_size, self.steps * self.HISTORY_POINTS),
            keras.losses.BinaryCrossentropy(from_logits=True),
            metrics=[accuracy],
            jit_compile=False,
            steps_per_execution=steps_per_execution(self.steps),
        )

    def train(self, category: int, start: keras.Model, seed: int) -> dict[str, list[float]]:
        """Trains one Stage 2 CNN from the weights of `start`; returns its history, a value per round."""
        timer = EpochTimer()
        _seed(self.network, seed)
        self.network.set_weights(start.get_weights())
        self.head.category.assign(category)
        for variable in self.trainer.optimizer.variables:  # momentum and step count of the category before
            variable.assign(tf.zeros_like(variable))
        correct = np.float32(self.labels == category)  # (N,), 1 where it is correct to say `category`
        # In the calibration split the question is only asked where Stage 1 says `category`.
        asked = len(self.data.train) + np.flatnonzero(self.predicted == category)
        history = self.trainer.fit(
            batches(correct, self.batch_size, self._order(category, np.random.default_rng(seed))),
            epochs=self.HISTORY_POINTS, steps_per_epoch=self.steps, shuffle=False, verbose=0, callbacks=[timer],
            validation_data=batches(correct, 500, asked) if len(asked) else None,
        ).history  # fmt: skip
        self.model.stage2_cnn(category).set_weights(self.network.get_weights())
        self.model.reset_calibration([category])
        return {**history, "seconds": timer.seconds}

    def _order(self, category: int, rng: np.random.Generator) -> np.ndarray:
        """Indices of the train images of one whole training."""
        count = self.HISTORY_POINTS * self.steps * self.batch_size
        return sample_hard_negatives(self.data.train.labels, self.probability[:, category], category, count, rng)


def train_stage2(
    model: MultiStageCNN, data: Dataset, recipe: Recipe, seed: int = 0, start: str = "stage2_base"
) -> dict[str, dict[str, list[float]]]:
    """Trains the trainable Stage 2 CNNs: 'Stage 1 says c: is it correct?'

    Each CNN is fine-tuned by binary cross-entropy on its log-odds of c, on batches that are half images of c
    and half images that Stage 1 takes, or nearly takes, for c.

    Args:
        start: "stage2_base": begin with a copy of the Stage 2 base network; "current": go on from the CNN as it is.

    Returns:
        A history for each category's name: loss, accuracy, val_loss, val_accuracy and seconds.
    """
    trainer, histories, categories = Stage2Trainer(model, data, recipe), {}, model.trainable_categories()
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
