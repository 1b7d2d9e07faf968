"""What networks say of images: views, graphs traced once, batches."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from PIL import Image

from mscnn_parts.checks import check_count
from mscnn_parts.decision import Stage1Outputs, StageScores, log_odds, margin
from mscnn_parts.networks import feature_extractor, sees_images
from mscnn_parts.on_disk import IndexedRows
from mscnn_parts.pictures import Images, read_image
from mscnn_parts.settings import MSCNNError

WEAKEST_STRENGTH = 1e-3  # of a whitening filter, whose usual strength is about 1: what is below is the same, flat


def validated_images(images: Images, shape: Sequence[int]) -> np.ndarray:
    """Returns images as uint8 (B, *shape): such an array as it is; a path, a Pillow image or a list as they are read.

    Raises:
        MSCNNError: it is another array, or no image.
    """
    kinds = (str, os.PathLike, Image.Image)
    images = [images] if isinstance(images, kinds) else images
    if isinstance(images, (list, tuple)) and all(isinstance(one, (*kinds, np.ndarray)) for one in images):
        images = read_image(images, shape)
    if (
        not isinstance(images, (np.ndarray, IndexedRows))
        or images.shape[1:] != tuple(shape)
        or images.dtype != np.uint8
    ):
        raise MSCNNError(
            f"Images are {getattr(images, 'dtype', type(images).__name__)} {np.shape(images)}: this model takes "
            f"uint8 (B, {', '.join(map(str, shape))}). load_dataset() gives that, and read_image() one of them: "
            "image[None] makes a batch of it. Images of other sizes are resized if they stand in a list."
        )
    return images


def on_views(network: keras.Model, views: int, images: tf.Tensor) -> tf.Tensor:
    """What a network says of the views of each image, side by side: (B, views times its outputs).

    Args:
        views: 1, the image; 2, the image and its mirror image (test-time augmentation).
        images: uint8 (B, H, W, channels); or features (B, ...), which have one view.
    """
    if views == 1:
        return network(images, training=False)
    both = tf.concat([images, tf.reverse(images, [2])], axis=0)  # (views B, H, W, channels)
    return tf.concat(tf.split(network(both, training=False), views), axis=1)


def _traced(function: Callable, network: keras.Model, *before):
    """A function of any number of a network's images, preceded by arguments like `before`, as a graph.

    Called as its one trace, without the checks that would choose among several; and without AutoGraph, since there
    is no Python control flow to translate.
    """
    dtype = "uint8" if sees_images(network) else "float32"  # features are cast by the network
    signature = [*before, tf.TensorSpec(network.input_shape, dtype)]
    return tf.function(function, input_signature=signature, autograph=False).get_concrete_function()


def stage2_graph(network: keras.Model, views: int) -> Callable:
    """Handles of a Stage 2 CNN's variables, images -> its logits on the views, (B, views C); see `stage2_caller`.

    All Stage 2 CNNs are one graph, traced once with the variables of one of them.
    """

    def logits(handles, images):
        mapping = [(w, _read(h, w)) for w, h in zip(network.weights, handles, strict=True)]
        with keras.StatelessScope(state_mapping=mapping):
            return on_views(network, views, images)

    return _traced(logits, network, [tf.TensorSpec((), tf.resource)] * len(network.weights))


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


class Networks:
    """Stage 1 and the Stage 2 CNNs run on arrays of uint8 images (B, H, W, channels), as graphs traced once.

    Args:
        stage2: the Stage 2 networks, by category. trunk: from images to the features that they see; None: they see
            the images.
        views: 1, each image; 2, its mirror image, too (test-time augmentation).
    """

    SLAB = 2**26  # features that are kept at a time, 256 MB
    PIXELS = 200_000  # that larger images than CIFAR-10's have in a batch

    def __init__(self, stage1: keras.Model, stage2: Sequence[keras.Model], trunk: keras.Model | None, views: int):
        self.stage1, self.stage2, self.trunk, self.views = stage1, tuple(stage2), trunk, views

    def _at_once(self, batch_size: int) -> int:
        """How many images to run at a time: of more than 32 pixels fewer, for memory's sake; a CPU is as fast then."""
        size = self.stage1.get_layer("whitening").input.shape[1]
        fitting = max(1, self.PIXELS // size**2)
        return batch_size if size <= 32 else min(batch_size, fitting // 8 * 8 or fitting)  # see `in_batches`

    @functools.cached_property
    def stage1_graph(self) -> Callable:
        """Images -> Stage 1's logits on a single view, (B, C)."""
        return _traced(functools.partial(self.stage1, training=False), self.stage1)

    @functools.cached_property
    def stage1_outputs_graph(self) -> Callable:
        """Images -> what `feature_extractor` gives on the views, side by side: (B, views (C + T + 2 D))."""
        return _traced(functools.partial(on_views, feature_extractor(self.stage1), self.views), self.stage1)

    @functools.cached_property
    def trunk_graph(self) -> Callable:
        """The same with the trunk's features: (B, views (C + T + 2 D + K))."""
        return _traced(functools.partial(on_views, feature_extractor(self.stage1, self.trunk), self.views), self.stage1)

    @functools.cached_property
    def stage2_graph(self) -> Callable:
        return stage2_graph(self.stage2[0], 1 if self.trunk else self.views)

    def stage1_logits(self, images: np.ndarray, batch_size: int = 512) -> np.ndarray:
        """Stage 1's logits on a single view, float32 (B, C)."""
        return in_batches(self.stage1_graph, images, self._at_once(batch_size))

    def stage1_outputs(self, images: np.ndarray, batch_size: int = 512) -> Stage1Outputs:
        """Stage 1's logits on each view, and the means over the views of what it sees first."""
        return self._outputs_and_features(self.stage1_outputs_graph, images, batch_size)[0]

    def _outputs_and_seen(self, images: np.ndarray, batch_size: int) -> tuple[Stage1Outputs, np.ndarray]:
        """Stage 1's outputs, and what Stage 2 sees: the images, or the trunk's features of the views, (B, views, K)."""
        if self.trunk:
            return self._outputs_and_features(self.trunk_graph, images, batch_size)
        return self.stage1_outputs(images, batch_size), images

    def _outputs_and_features(
        self, graph: Callable, images: np.ndarray, batch_size: int
    ) -> tuple[Stage1Outputs, np.ndarray]:
        """What a graph gives, by its parts: Stage 1's outputs, and features (B, views, K or none)."""
        both = in_batches(graph, images, self._at_once(batch_size))
        widths = [self.stage1.get_layer(name).output.shape[-1] for name in ("logits", "block1", "whitened")]
        parts = np.stack(np.split(both, self.views, axis=1))  # (views, B, C + T + 2 D + K)
        outputs = split_outputs(parts, widths[0], widths[1], widths[2] // 2)
        return outputs, parts[..., sum(widths) :].swapaxes(0, 1)

    def stage2_log_odds(self, images: np.ndarray, category: int, batch_size: int = 512) -> np.ndarray:
        """Log-odds that the images show `category`, by its Stage 2 network, the mean over the views: float64 (B,).

        Args:
            batch_size: images at a time; the network sees all views of them at once.
        """
        slabs = self._slabs(images, batch_size)
        seen = (self._outputs_and_seen(slab, batch_size)[1] if self.trunk else slab for slab in slabs)
        return np.concatenate([self._verified(part, category, batch_size) for part in seen])

    def _verified(self, seen: np.ndarray, category: int, batch_size: int) -> np.ndarray:
        """As `stage2_log_odds`, of what Stage 2 sees."""
        graph, where = stage2_caller(self.stage2_graph, self.stage2[category]), np.full(len(seen), category)
        if self.trunk:
            features = seen.reshape(-1, *self.trunk.output_shape[1:])  # (B views, ...)
            maps = features.ndim == 4
            logits = in_batches(graph, features, self._at_once(batch_size) if maps else batch_size)  # (B views, C)
            by_view = list(logits.reshape(len(seen), self.views, logits.shape[-1]).swapaxes(0, 1))
        else:
            by_view = np.split(in_batches(graph, seen, self._at_once(batch_size)), self.views, axis=1)
        return np.mean([log_odds(view, where) for view in by_view], axis=0)

    def scores(self, images: np.ndarray, batch_size: int = 512) -> StageScores:
        """Both stages' scores, not yet combined.

        Stage 1 answers by its mean logits over the views: two views err less often than one, and an answer that
        changes in the mirror has a small margin. Only the Stage 2 network of the predicted category is run: the images
        are sorted by category first.
        """
        parts = [self._scores(slab, batch_size) for slab in self._slabs(images, batch_size)]
        fields = zip(StageScores._fields, zip(*parts, strict=True), strict=True)
        return StageScores(*(np.concatenate(values, axis=int(name == "logits")) for name, values in fields))

    def _slabs(self, images: np.ndarray, batch_size: int) -> list[np.ndarray]:
        """The images in parts of whole batches, of each of which the trunk's features are kept."""
        check_count("batch_size", batch_size)
        slab = max(1, len(images))
        if self.trunk:
            values = self.views * math.prod(self.trunk.output_shape[1:])  # of an image
            slab = max(1, self.SLAB // values // batch_size) * batch_size
        return [images[i : i + slab] for i in range(0, max(1, len(images)), slab)]

    def _scores(self, images: np.ndarray, batch_size: int) -> StageScores:
        outputs, seen = self._outputs_and_seen(images, batch_size)
        logits = outputs.logits.mean(axis=0)  # (B, C)
        category = logits.argmax(axis=1)  # (B,)
        stage2 = np.zeros(len(images))
        for c in np.unique(category):
            chosen = np.flatnonzero(category == c)
            stage2[chosen] = self._verified(seen[chosen], c, batch_size)
        return StageScores(category, margin(logits, category), stage2, *outputs)


def split_outputs(parts: np.ndarray, categories: int, channels: int, filters: int) -> Stage1Outputs:
    """What `feature_extractor` gives on the views, float32 (views, B, C + T + 2 D ...), by its parts."""
    logits, block1_means, *halves, _ = np.split(parts, np.cumsum([categories, channels, filters, filters]), axis=2)
    strength = sum(halves).mean(axis=0)  # (B, D); a filter answers by itself or by its negative
    return Stage1Outputs(logits, block1_means.mean(axis=0), np.log(strength + WEAKEST_STRENGTH))


def in_batches(graph: Callable, images: np.ndarray, batch_size: int) -> np.ndarray:
    """Runs a graph over images, `batch_size` (1 or more) at a time: (N, ...) -> float32 (N, outputs).

    A batch of more than 8 is filled up to a multiple of 8, so that few shapes occur: each new one
    costs the libraries below TensorFlow some milliseconds of preparation.
    """
    check_count("batch_size", batch_size)
    results = []
    for start in range(0, max(1, len(images)), batch_size):
        batch = images[start : start + batch_size]
        missing = -len(batch) % 8 if len(batch) > 8 else int(not len(batch))  # a graph has to see an image
        filled = np.pad(batch, [(0, missing), *[(0, 0)] * (batch.ndim - 1)]) if missing else batch
        results.append(graph(tf.constant(filled)).numpy()[: len(batch)])
    return np.concatenate(results)
