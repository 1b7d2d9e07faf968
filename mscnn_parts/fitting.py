"""Fits one network on a data set: batches of indices, the trainer that holds the images, and `train_classifier`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.callbacks import (
    AlternatingFlip,
    EpochLines,
    EpochTimer,
    ProgressiveCrops,
    RestoreBestWeights,
    ShowProgress,
    in_notebook,
)
from mscnn_parts.data import Dataset, train_and_calibration
from mscnn_parts.networks import sees_images
from mscnn_parts.on_disk import IndexedRows
from mscnn_parts.optimizers import Recipe, stage1_optimizer
from mscnn_parts.settings import MSCNNError


def batches(
    labels: np.ndarray,
    batch_size: int,
    order: np.ndarray | None = None,
    shuffle_seed: int | None = None,
    images: IndexedRows | None = None,
) -> tf.data.Dataset:
    """Batches for `fit` of a `Trainer`: indices int64 (B,) and labels (B, ...).

    tf.data's autotuning is off: nothing is left for it to tune, and ending its thread was seen to take 16 s at the end
    of a 24 s epoch (TensorFlow 2.21, on CPU).

    Args:
        labels: of all images, (N, ...), of any dtype.
        order: indices int64 in the order wanted, with repetitions if need be; None: each image once.
        shuffle_seed: shuffles the indices anew in every epoch; None: as they are.
        images: the batches have these, (B, ...), in place of their indices; two are read ahead. The caller has to
            keep them as long as it takes batches.
    """
    with tf.device("CPU"):  # where tf.data works
        labels = tf.convert_to_tensor(labels)
    indices = tf.data.Dataset.from_tensor_slices(np.arange(len(labels)) if order is None else order)
    if shuffle_seed is not None:
        indices = indices.shuffle(len(indices), seed=shuffle_seed)

    @tf.autograph.experimental.do_not_convert
    def look_up(index):
        return index if images is None else _reader(images)(index), tf.gather(labels, index)

    options = tf.data.Options()
    options.autotune.enabled = False
    return indices.batch(batch_size).map(look_up).prefetch(2).with_options(options)


def _reader(images: IndexedRows) -> Callable[[tf.Tensor], tf.Tensor]:
    """Indices (B,) -> those of the images, (B, ...), as long as these exist.

    TensorFlow keeps the inner function for good, which is not to keep the images.
    """
    stored, dtype, shape = weakref.ref(images), images.dtype, images.shape[1:]

    def read(index):
        rows = tf.numpy_function(lambda chosen: np.asarray(stored()[chosen]), [index], dtype)
        return tf.ensure_shape(rows, (None, *shape))

    return read


def seed_training(network: keras.Model, seed: int) -> None:
    """Seeds all that is random in a training: Python, NumPy, TensorFlow (shuffling), and the augmentation."""
    keras.utils.set_random_seed(seed)
    if sees_images(network):  # nothing augments features
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
            else; it is no weight. `IndexedRows` stay where they are, and `batches` reads them.
        head: a layer for what the network says; None: nothing is done with it.
    """

    def __init__(self, network: keras.Model, images: np.ndarray, head: keras.layers.Layer | None = None):
        super().__init__()
        self.network, self.head = network, head or keras.layers.Identity()
        self.stored = images if isinstance(images, IndexedRows) else None
        self.images = tf.Variable(images, trainable=False) if self.stored is None else None
        self.built = True  # the network is

    def call(self, inputs, training=False):
        """Indices int64 (B,), or images uint8 (B, H, W, channels) -> what the head makes of the network's output."""
        images = tf.gather(self.images, inputs) if len(inputs.shape) == 1 else inputs
        return self.head(self.network(images, training=training))

    def batches(
        self, labels: np.ndarray, batch_size: int, order: np.ndarray | None = None, shuffle_seed: int | None = None
    ) -> tf.data.Dataset:
        """As the function `batches`, with indices of the images that lie here, or with those that do not."""
        return batches(labels, batch_size, order, shuffle_seed, self.stored)

    def save(self, filepath: str | Path, **kwargs) -> None:
        self.network.save(filepath, **kwargs)

    def save_weights(self, filepath: str | Path, **kwargs) -> None:
        self.network.save_weights(filepath, **kwargs)


def validation_batch(network: keras.Model, batch_size: int) -> int:
    """How many calibration images are measured at a time: as many pixels as 500 images of 32 have, or a training batch.

    A network that sees features takes 500.
    """
    if not sees_images(network):
        return 500
    size = network.get_layer("whitening").input.shape[1]
    return min(500, max(batch_size, 500 * 32**2 // size**2))


def compile_trainer(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    loss: keras.losses.Loss,
    metric: keras.metrics.Metric,
    steps_of_epoch: int,
) -> keras.Model:
    """Compiles a model for `fit`, and returns it.

    The optimizer is built here and the metric has its variables: TensorFlow traces a step that makes any twice.
    """
    model.compile(
        optimizer, loss, metrics=[metric],
        jit_compile=False,  # XLA was slower on CPU wherever it was measured; on GPU it has not been tried
        steps_per_execution=steps_per_execution(steps_of_epoch),
    )  # fmt: skip
    model.optimizer.build(model.trainable_variables)
    return model


def compile_classifier(
    model: keras.Model, recipe: Recipe, steps: int, optimizer: keras.optimizers.Optimizer | None = None
) -> keras.Model:
    """Compiles a model for training by the recipe, and returns it.

    Args:
        steps: of the whole training, over which the learning rate rises and falls.
        optimizer: in place of the recipe's.
    """
    return compile_trainer(
        model, optimizer or stage1_optimizer(recipe, steps),
        keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=recipe.label_smoothing),
        keras.metrics.CategoricalAccuracy("accuracy"), steps // recipe.epochs,
    )  # fmt: skip


def check_trainable(network: keras.Model) -> None:
    """Raises MSCNNError if a network is frozen: Keras would train nothing and warn."""
    if not network.trainable:
        raise MSCNNError(f"{network.name} is frozen: set its trainable to True, or leave stage2_only off.")


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
    check_trainable(network)
    seed_training(network, seed)
    both = train_and_calibration(data)
    one_hot = keras.utils.to_categorical(both.labels, len(data.category_names))
    train, calibration = np.split(np.arange(len(both)), [len(data.train)])
    steps = -(-len(train) // recipe.batch_size) * recipe.epochs
    trainer = compile_classifier(trainer_class(network, both.images), recipe, steps, optimizer)
    del both  # the trainer has what it needs
    augmentation, timer = network.get_layer("augmentation"), EpochTimer()
    small = int(recipe.small_crops * recipe.epochs)
    by_epoch = [AlternatingFlip(augmentation), ProgressiveCrops(augmentation, small)]
    logs = [keras.callbacks.TensorBoard(log_dir)] if log_dir else []
    title = network.name.replace("_", " ").replace("stage", "Stage ")
    progress = [ShowProgress(title)] if in_notebook() else []  # a hook after each step is not free
    try:
        history = trainer.fit(
            trainer.batches(one_hot, recipe.batch_size, train, seed), epochs=recipe.epochs, shuffle=False, verbose=0,
            validation_data=trainer.batches(one_hot, validation_batch(network, recipe.batch_size), calibration),
            callbacks=[timer, EpochLines(small), *by_epoch, *callbacks, RestoreBestWeights(), *progress, *logs],
        )  # fmt: skip
    finally:  # also of a training that was interrupted
        augmentation.reset()
    return {**history.history, "seconds": timer.seconds}
