"""What networks say of images: views, graphs traced once, batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.decision import Stage1Outputs
from mscnn_parts.networks import feature_extractor
from mscnn_parts.settings import MSCNNError

WEAKEST_STRENGTH = 1e-3  # of a whitening filter, whose usual strength is about 1: what is below is the same, flat


def validated_images(images: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Returns the images, or raises MSCNNError if they are not uint8 (B, *shape)."""
    if not isinstance(images, np.ndarray) or images.shape[1:] != tuple(shape) or images.dtype != np.uint8:
        raise MSCNNError(
            f"Images are {getattr(images, 'dtype', type(images).__name__)} {np.shape(images)}: this model takes "
            f"uint8 (B, {', '.join(map(str, shape))}). load_dataset() gives that, and read_image() one of them: "
            "image[None] makes a batch of it."
        )
    return images


def on_views(network: keras.Model, views: int, images):
    """What a network says of the views of each image, side by side: (B, views times its outputs).

    Args:
        views: 1, the image; 2, the image and its mirror image (test-time augmentation).
        images: uint8 (B, H, W, channels).
    """
    both = tf.concat([images, tf.reverse(images, [2])][:views], axis=0)  # (views B, H, W, channels)
    return tf.concat(tf.split(network(both, training=False), views), axis=1)


def _traced(function: Callable, network: keras.Model, *before):
    """A function of any number of a network's images, preceded by arguments like `before`, as a graph.

    Called as its one trace, without the checks that would choose among several; and without AutoGraph, since there
    is no Python control flow to translate.
    """
    signature = [*before, tf.TensorSpec(network.input_shape, tf.uint8)]
    return tf.function(function, input_signature=signature, autograph=False).get_concrete_function()


def stage1_graph(stage1: keras.Model):
    """Images -> Stage 1's logits on a single view, (B, C)."""
    return _traced(functools.partial(stage1, training=False), stage1)


def stage1_outputs_graph(stage1: keras.Model, views: int):
    """Images -> what `feature_extractor` gives on the views, side by side: (B, views (C + T + 2 D))."""
    return _traced(functools.partial(on_views, feature_extractor(stage1), views), stage1)


def stage2_graph(base: keras.Model, views: int):
    """Handles of a Stage 2 CNN's variables, images -> its logits on the views, (B, views C); see `stage2_caller`.

    All Stage 2 CNNs are one graph, traced once with the variables of their base network.
    """

    def logits(handles, images):
        mapping = [(w, _read(h, w)) for w, h in zip(base.weights, handles, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            return on_views(base, views, images)

    return _traced(logits, base, [tf.TensorSpec((), tf.resource)] * len(base.weights))


def stage2_caller(graph: Callable, network: keras.Model) -> Callable:
    """The graph of `stage2_graph` with the variables of one Stage 2 CNN.

    By their handles: their values would have to be read one by one before the call, half a millisecond.
    """
    return functools.partial(graph, [w.value.handle for w in network.weights])


def _read(handle, like):
    """The value of the variable with a handle, which does not tell its type and shape: those of the variable `like`."""
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=like.dtype)
    value.set_shape(like.shape)
    return value


def split_outputs(both: np.ndarray, views: int, categories: int, channels: int, filters: int) -> Stage1Outputs:
    """The parts of what `stage1_outputs_graph` gives, float32 (B, views (C + T + 2 D))."""
    parts = np.stack(np.split(both, views, axis=1))  # (views, B, C + T + 2 D)
    logits, block1_means, *halves = np.split(parts, np.cumsum([categories, channels, filters]), axis=2)
    strength = sum(halves).mean(axis=0)  # (B, D); a filter answers by itself or by its negative
    return Stage1Outputs(logits, block1_means.mean(axis=0), np.log(strength + WEAKEST_STRENGTH))


def in_batches(graph: Callable, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Runs a graph over images, `batch_size` (1 or more) at a time: (N, ...) -> float32 (N, outputs).

    A batch of more than 8 is filled up to a multiple of 8, so that few shapes occur: each new one
    costs the libraries below TensorFlow some milliseconds of preparation.
    """
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise MSCNNError(f"batch_size is {batch_size}: it is a number of images, a whole number from 1 on.")
    results = []
    for start in range(0, max(1, len(images)), batch_size):
        batch = images[start : start + batch_size]
        missing = -len(batch) % 8 if len(batch) > 8 else int(not len(batch))  # a graph has to see an image
        filled = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch
        results.append(graph(tf.constant(filled)).numpy()[: len(batch)])
    return np.concatenate(results)
