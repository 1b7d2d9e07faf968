"""Class Activation Maps, occlusion, the test of an explanation on random weights, and how an image was decided."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.checks import check_categories_within, checked_labels
from mscnn_parts.layers import WhiteningConv, log_odds_tensor
from mscnn_parts.networks import OWN_INPUT, sees_images
from mscnn_parts.settings import OTHER, MSCNNError, did_you_mean

if TYPE_CHECKING:
    from mscnn_parts.model import MultiStageCNN


def map_layers(network: keras.Model) -> tuple[str, str]:
    """Names the two layers that explain a network: one with a finer map, and the last. They may be the same."""
    names = [layer.name for layer in network.layers]
    blocks = [name for name in names if re.fullmatch(r"block\d+", name)][-2:] or names[-1:]
    if OWN_INPUT in names:
        return OWN_INPUT, OWN_INPUT
    return ("features", "features") if "features" in names else (blocks[0], blocks[-1])


def has_cam(network: keras.Model) -> bool:
    """Says whether the last dense layer sees only means, so that `class_activation_map` can read a map off it."""
    return "pooled" in [layer.name for layer in network.layers]


def class_activation_map(network: keras.Model, images: np.ndarray, category: int) -> np.ndarray:
    """The original CAM: what each place of the last feature map adds to the category's logit.

    For networks that end in global average pooling and one dense layer. Source: Zhou et al. 2016.

    Args:
        images: uint8 (B, H, W, channels).

    Returns:
        float32 (B, h, w); its mean plus the dense layer's bias is the logit.
    """
    _check_explained(network, images)
    check_categories_within(np.atleast_1d(category), network.output_shape[-1])
    features = keras.Model(network.inputs[0], network.get_layer("pooled").input)(images, training=False)  # (B, h, w, K)
    scale = next((layer.scale for layer in network.layers if layer.name == "scaled"), 1.0)
    weights = scale * network.get_layer("logits").kernel.numpy()[:, category]  # (K,)
    return np.asarray(tf.cast(features, tf.float32)) @ weights


def grad_cam(network: keras.Model, images: np.ndarray, target: Callable, layer: str = "") -> np.ndarray:
    """Grad-CAM: where a layer's features raise a target. Source: Selvaraju et al. 2017, section 3.

    Args:
        images: uint8 (B, H, W, channels).
        target: from logits (B, C) to the value to explain (B,), such as `lambda z: z[:, 3]`.
        layer: a layer with a feature map; its size is the map's. "": the first of `map_layers`.

    Returns:
        float32 (B, h, w), at least 0.
    """
    layer = layer or map_layers(network)[0]
    _check_explained(network, images, layer)
    maps, head = split_at(network, images, layer)  # (B, h, w, K)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        value = target(head(maps, training=False))
    gradient = tf.cast(tape.gradient(value, maps), tf.float32)  # (B, h, w, K)
    weights = tf.reduce_mean(gradient, axis=(1, 2), keepdims=True)  # (B, 1, 1, K)
    return np.asarray(tf.nn.relu(tf.reduce_sum(weights * tf.cast(maps, tf.float32), axis=-1)))


def split_at(network: keras.Model, images: np.ndarray, layer: str) -> tuple[tf.Tensor, keras.Model]:
    """Returns a layer's feature maps (B, h, w, K) of images, and the network from there on."""
    features = network.get_layer(layer).output
    maps = keras.Model(network.inputs[0], features)(images, training=False)
    if layer != OWN_INPUT:
        return maps, keras.Model(features, network.outputs[0])
    own = next(one for one in network.layers if isinstance(one, keras.Model))
    outputs = [layer.output for layer in own.layers if hasattr(layer, "output")]
    inner = [output for output in outputs if len(output.shape) == 4]
    if not inner:  # a class of one's own, whose layers only it can run
        return maps, own
    return keras.Model(own.inputs[0], inner[-1])(maps, training=False), keras.Model(inner[-1], own.outputs[0])


def occlusion(
    network: keras.Model, images: np.ndarray, target: Callable, size: int | None = None, stride: int | None = None
) -> np.ndarray:
    """Measures how far a target falls when the image's mean color covers a square of the image.

    Source: Zeiler & Fergus 2014, section 4.2.

    Args:
        images: uint8 (B, H, W, channels). target: as of `grad_cam`.
        size, stride: of the square, in pixels; None: a quarter of the image's shorter side, and half of that.

    Returns:
        float32 (B, h, w); positive where the square speaks for the target.
    """
    height, width = images.shape[1:3]
    size = size or max(2, min(height, width) // 4)
    stride = stride or max(1, size // 2)
    tops, lefts = (range(0, max(1, side - size + 1), stride) for side in (height, width))
    maps = []
    for image in images:
        covered = np.repeat(image[None], len(tops) * len(lefts) + 1, axis=0)  # (1 + h w, H, W, channels)
        for number, (top, left) in enumerate(np.ndindex(len(tops), len(lefts)), start=1):
            place = np.s_[number, tops[top] : tops[top] + size, lefts[left] : lefts[left] + size]
            covered[place] = image.mean(axis=(0, 1))
        values = np.asarray(target(network(covered, training=False)), np.float32)  # (1 + h w,)
        maps.append((values[0] - values[1:]).reshape(len(tops), len(lefts)))
    return np.stack(maps)


def randomized(network: keras.Model, seed: int = 0) -> keras.Model:
    """Returns the network as it was before any training: an explanation that stays the same explains nothing of it.

    Source: Adebayo et al. 2018. Scaling and whitening, which no training moves, stay.

    Args:
        seed: of the new weights. Random numbers elsewhere go on as if this had not been called.
    """
    state = random.getstate()
    random.seed(seed)  # Keras draws from it a seed for each initializer
    copy = keras.models.clone_model(network)
    random.setstate(state)
    for layer, own in zip(network.layers, copy.layers, strict=True):
        if isinstance(layer, WhiteningConv):
            own.set_weights(layer.get_weights())
    return copy


def _check_explained(network: keras.Model, images: np.ndarray, layer: str = "pooled") -> None:
    """Raises MSCNNError for images of another dtype or shape, or a layer that is not there."""
    shape, dtype = np.shape(images), getattr(images, "dtype", type(images).__name__)
    if dtype != np.uint8 or shape[1:] != network.input_shape[1:]:
        wanted = ", ".join(map(str, network.input_shape[1:]))
        if not sees_images(network):
            raise MSCNNError(f"{network.name} sees features (B, {wanted}): explain model.verifier(category).")
        raise MSCNNError(f"Images are {dtype} {shape}: {network.name} takes uint8 (B, {wanted}).")
    names = [known.name for known in network.layers]
    if layer not in names:
        raise MSCNNError(
            f"{network.name} has no layer '{layer}'.{did_you_mean(layer, names)} Choose among: {', '.join(names)}."
        )


class DecisionTrace(NamedTuple):
    """Explains how one image was decided."""

    image: np.ndarray  # uint8 (H, W, channels)
    truth: str  # "" where it is not known
    stage1_map: np.ndarray  # (h, w): why this category
    stage2_map: np.ndarray  # (h, w): why correct; where it is empty, nothing speaks for 'correct'
    top3: list[tuple[str, float]]  # Stage 1's most probable categories
    stage2_confidence: float
    confidence: float
    verdict: str
    reason: str  # see `Decisions.reasons`


def trace_decisions(
    model: MultiStageCNN, images: np.ndarray, labels: np.ndarray | None = None, threshold: float | None = None
) -> list[DecisionTrace]:
    """Explains the decisions on uint8 images (B, H, W, channels), one trace per image."""
    decisions, names = model.decide(images, threshold), [*model.category_names, OTHER]
    labels = None if labels is None else checked_labels(decisions.category, labels)
    probability, reasons = np.asarray(tf.nn.softmax(decisions.stage1_logits)), decisions.reasons()  # (B, C), (B,)
    category = decisions.stage1_category
    if not len(category):
        return []
    stage1_maps = grad_cam(model.stage1, images, lambda z: tf.gather(z, category, batch_dims=1))  # (B, h, w)
    stage2_maps: dict[int, np.ndarray] = {}
    for c in np.unique(category):
        where = np.flatnonzero(category == c)
        maps = grad_cam(model.verifier(c), images[where], lambda z, c=c: log_odds_tensor(z, c))
        stage2_maps |= dict(zip(where.tolist(), maps, strict=True))
    return [
        DecisionTrace(
            image=images[i],
            truth="" if labels is None else names[labels[i]],
            stage1_map=stage1_maps[i],
            stage2_map=stage2_maps[i],
            top3=[(names[k], float(probability[i, k])) for k in np.argsort(-probability[i])[:3]],
            stage2_confidence=float(decisions.stage2_confidence[i]),
            confidence=float(decisions.confidence[i]),
            verdict=names[decisions.category[i]],
            reason=str(reasons[i]),
        )
        for i in range(len(images))
    ]
