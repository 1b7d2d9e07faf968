"""Transfer learning: features of a network that stands still, heads trained on them, and staged unfreezing."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.callbacks import EpochTimer, RestoreBestWeights
from mscnn_parts.data import Dataset
from mscnn_parts.downloads import cache_folder
from mscnn_parts.fitting import Trainer, check_trainable, compile_classifier, seed_training, train_classifier
from mscnn_parts.inference import in_batches
from mscnn_parts.model_files import sha256_of
from mscnn_parts.networks import layers_by_group, on_images, trunk_of
from mscnn_parts.on_disk import filled, indexed, joined
from mscnn_parts.optimizers import Recipe, phase_recipes
from mscnn_parts.settings import MSCNNError
from mscnn_parts.zoo import Network

if TYPE_CHECKING:
    from mscnn_parts.model import MultiStageCNN


IN_MEMORY = 1e9  # bytes of features; more are kept in a temporary file


class TrunkFeatures(NamedTuple):
    """Features of a trunk, those of the train split before those of the calibration split."""

    train: np.ndarray  # (views N, ...), of augmented views of the N images, one view after the other
    calibration: np.ndarray  # (M, ...), of the images as they are
    views: int

    def with_labels(self, data: Dataset) -> tuple[np.ndarray, np.ndarray]:
        """All of them, (views N + M, ...), and their labels."""
        labels = [np.tile(data.train.labels, self.views), data.calibration.labels]
        return joined(self.train, self.calibration), np.concatenate(labels)


def trunk_features(trunk: keras.Model, data: Dataset, views: int = 3, seed: int = 0) -> TrunkFeatures:
    """Computes what a trunk (see `MultiStageCNN.trunk`) makes of the train and the calibration split."""
    augmentation = trunk.get_layer("augmentation")
    behind = keras.Model(augmentation.output, trunk.outputs[0])
    augmentation.reseed(seed)

    @tf.function(reduce_retracing=True)
    def features(images, training):
        return behind(augmentation(images, training=training), training=False)

    def in_parts():
        for images, training in [(data.train.images, True)] * views + [(data.calibration.images, False)]:
            for start in range(0, len(images), 64):
                yield features(tf.constant(images[start : start + 64]), training).numpy()

    count = views * len(data.train)
    shape = (count + len(data.calibration), *trunk.output_shape[1:])
    dtype, folders = tf.as_dtype(trunk.outputs[0].dtype).as_numpy_dtype, [cache_folder(), Path(tempfile.gettempdir())]
    stored = indexed(filled(shape, dtype, in_parts(), IN_MEMORY, folders))
    return TrunkFeatures(stored[:count], stored[count:], views)


def features_of(model: MultiStageCNN, data: Dataset, views: int) -> TrunkFeatures:
    """As `trunk_features`, kept until `release_features` or until the model's trunk or the data are others."""
    key = (sha256_of(model.trunk.get_weights()), data.fingerprint, views)
    kept = getattr(model, "_kept_features", None)
    if kept is None or kept[0] != key:
        kept = (key, trunk_features(model.trunk, data, views))
        model._kept_features = kept
    return kept[1]


def release_features(model: MultiStageCNN) -> None:
    """Frees the memory, or the file, of what `features_of` keeps."""
    model._kept_features = None


def stage2_base_logits(model: MultiStageCNN, images: np.ndarray) -> np.ndarray:
    """Logits (B, C) of the Stage 2 base network for uint8 images (B, H, W, channels), which are read in batches."""
    base = on_images(model.stage1, model.stage2_base, model.stage2_base)
    graph = tf.function(functools.partial(base, training=False), reduce_retracing=True)
    return in_batches(graph, images, 500 if base is model.stage2_base else 64)


def train_head(
    head: keras.Model,
    features: TrunkFeatures,
    data: Dataset,
    recipe: Recipe,
    seed: int = 0,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> dict[str, list[float]]:
    """Trains a network from pooled features (B, K) to logits (B, C) on all categories, in seconds.

    An epoch has as many steps as the train split has batches; each image is seen in any of its views.

    Returns:
        A history as `train_classifier` gives it.

    Raises:
        MSCNNError: the head is frozen.
    """
    check_trainable(head)
    seed_training(head, seed)
    seen, labels = features.with_labels(data)
    one_hot = keras.utils.to_categorical(labels, len(data.category_names))
    train, calibration = np.split(np.arange(len(labels)), [len(features.train)])
    steps, timer = -(-len(data.train) // recipe.batch_size), EpochTimer()
    trainer = Trainer(head, seen)
    compile_classifier(trainer, recipe, steps * recipe.epochs)
    history = trainer.fit(
        trainer.batches(one_hot, recipe.batch_size, train, seed).repeat(), epochs=recipe.epochs, steps_per_epoch=steps,
        shuffle=False, verbose=0,
        validation_data=trainer.batches(one_hot, 500, calibration), callbacks=[timer, *callbacks, RestoreBestWeights()],
    )  # fmt: skip
    return {**history.history, "seconds": timer.seconds}


def free_groups(stage1: keras.Model, network: Network, groups: Sequence[int]) -> None:
    """Frees the head and some groups, and freezes the rest.

    BatchNormalization stays frozen everywhere: its statistics are those of ImageNet, and small batches would move them
    to worse ones.
    """
    free = {"head", *map(str, groups)}
    stage1.trainable = True
    for group, layers in layers_by_group(stage1, network).items():
        for layer in layers:
            layer.trainable = group in free and not isinstance(layer, keras.layers.BatchNormalization)


def group_fingerprints(stage1: keras.Model, network: Network) -> dict[str, str]:
    """SHA-256 of the weights of each group, so that anyone can check what a phase has left untouched."""
    return {
        group: sha256_of([array for layer in layers for array in layer.get_weights()])
        for group, layers in layers_by_group(stage1, network).items()
    }


def train_in_phases(
    stage1: keras.Model,
    network: Network,
    data: Dataset,
    recipe: Recipe,
    seed: int = 0,
    log_dir: str | Path | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> dict[str, list[float]]:
    """Trains a Stage 1 with ImageNet weights by the phases of the recipe; the best phase's weights are kept.

    Returns:
        The histories of the phases, one behind the other.

    Raises:
        MSCNNError: Stage 1 is frozen, or a phase frees a group that the network does not have.
    """
    check_trainable(stage1)
    unknown = {group for phase in recipe.phases for group in phase.groups} - set(range(len(network.groups)))
    if unknown:
        known = f"0 to {len(network.groups) - 1}" if network.groups else "none, so train it without phases"
        raise MSCNNError(f"A phase frees group {min(unknown)} of layers: this network has {known}.")
    history: dict[str, list[float]] = {}
    best, weights = -1.0, stage1.get_weights()
    for phase, own in zip(recipe.phases, phase_recipes(recipe), strict=True):
        freed = f"groups {', '.join(map(str, phase.groups))} and the last layer" if phase.groups else "the last layer"
        print(f"Epochs: {phase.epochs} with {freed} free, learning rate {phase.learning_rate:g}", flush=True)
        if phase.groups:
            free_groups(stage1, network, phase.groups)
            found = train_classifier(stage1, data, own, seed, log_dir, callbacks)
        else:
            head = keras.Model(stage1.get_layer("pooled").output, stage1.outputs[0])
            trunk = trunk_of(stage1, head, -1)
            found = train_head(head, trunk_features(trunk, data, recipe.views, seed), data, own, seed, callbacks)
        history = {key: [*history.get(key, []), *values] for key, values in found.items()}
        if max(found["val_accuracy"]) >= best:
            best, weights = max(found["val_accuracy"]), stage1.get_weights()
        stage1.set_weights(weights)
    stage1.trainable = True
    return history
