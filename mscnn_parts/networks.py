"""The one builder of Stage 1 and Stage 2 CNNs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.layers import Conv2D, FusedBatchNormalization, RandomFlipCrop, WhiteningConv

STAGE1_WIDTHS = (64, 256, 256)  # 118 million multiply-adds an image of 32 x 32 x 3
STAGE2_WIDTHS = (32, 64, 64)  # 17 million


def build_cnn(
    name: str,
    input_shape: Sequence[int],
    categories: int,
    widths: Sequence[int],
    mean: Sequence[float] | np.ndarray,
    std: Sequence[float] | np.ndarray,
    flip: bool,
    policy: str,
    logit_scale: float = 0.25,
    activation: str = "relu",
) -> keras.Model:
    """A small CNN from uint8 images (B, H, W, channels) to float32 logits (B, categories).

    Whitening, then a block per width: 3x3 convolution, pooling, 3x3 convolution. The outputs of the blocks
    are named `block1`, `block2`, ...; the last is averaged over its area and goes through ONE dense layer,
    so that a Class Activation Map can be read off its kernel.

    Args:
        mean, std: of each channel of the train split, in pixel values 0..255.
        flip: whether training mirrors images.
        policy: Keras dtype policy of the convolutions: "float32" or "mixed_bfloat16".
        logit_scale: factor of the dense layer's inputs. Below 1 its steps are smaller: at a high learning
            rate this layer is the first to diverge.
        activation: Keras' name of it.
    """
    layers = keras.layers
    inputs = x = keras.Input(tuple(input_shape), dtype="uint8")
    x = RandomFlipCrop(flip, name="augmentation")(x)
    scale, shift = [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    x = layers.Rescaling(scale, shift, dtype="float32", name="normalization")(x)
    x = WhiteningConv(name="whitening", dtype=policy)(x)  # (B, H-1, W-1, 8 channels)
    x = layers.Activation(activation, dtype=policy, name="whitened")(x)
    for block, width in enumerate(widths, start=1):
        for half in (1, 2):
            x = Conv2D(width, 3, padding="same", use_bias=False, dtype=policy)(x)
            if half == 1:
                x = layers.MaxPooling2D(2, dtype=policy)(x)
            x = FusedBatchNormalization(dtype=policy)(x)
            x = layers.Activation(activation, dtype=policy, name=f"block{block}" if half == 2 else None)(x)
    x = layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(x)  # (B, widths[-1])
    x = layers.Rescaling(logit_scale, dtype="float32", name="scaled")(x)
    return keras.Model(inputs, layers.Dense(categories, dtype="float32", name="logits")(x), name=name)


def feature_extractor(stage1: keras.Model) -> keras.Model:
    """From uint8 images (B, H, W, channels) to Stage 1's view of them, float32 (B, C + T + 2 D).

    Side by side: C logits; the means of the T channels of the first block; the means of the 2 D whitened
    channels, D filters and their negatives.
    """
    layers = keras.layers
    block1_means, whitened = (
        layers.GlobalAveragePooling2D(dtype="float32")(stage1.get_layer(name).output) for name in ("block1", "whitened")
    )
    return keras.Model(
        stage1.inputs[0], layers.Concatenate(dtype="float32")([stage1.outputs[0], block1_means, whitened])
    )


def set_whitening(networks: Iterable[keras.Model], images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Gives networks the whitening kernel of about 5,000 of the train images, uint8 (N, H, W, channels)."""
    sample = images[:: -(-len(images) // 5000)]  # from all over: images may be sorted by category
    kernel = whitening_kernel(sample, mean, std)
    for network in networks:
        network.get_layer("whitening").kernel.assign(kernel)


def whitening_kernel(images: np.ndarray, mean: np.ndarray, std: np.ndarray, epsilon: float = 5e-4) -> np.ndarray:
    """The kernel of `WhiteningConv`, float32 (2, 2, channels, 8 channels), from uint8 images (N, H, W, channels)."""
    x = (images.astype(np.float32) - mean) / std
    corners = [x[:, i : i - 1 or None, j : j - 1 or None] for i in (0, 1) for j in (0, 1)]
    patches = np.stack(corners, axis=3).reshape(-1, 4 * x.shape[-1])  # (patches, 4 channels)
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    kernel = (vectors / np.sqrt(values + epsilon)).reshape(2, 2, x.shape[-1], -1)
    return np.concatenate([kernel, -kernel], axis=-1).astype(np.float32)


def fastest_policy(repeats: int = 10) -> str:
    """Probes whether convolutions forward and backward are faster in bfloat16 here; takes under a second.

    Only a CPU is timed. Of a GPU it is known: from compute capability 8.0 on there are bfloat16 units, and a probe this
    short would time Python.

    Returns:
        "mixed_bfloat16" where it is at least 1.2 times as fast, else "float32".
    """
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability", (0, 0))
        return "mixed_bfloat16" if capability >= (8, 0) else "float32"

    def seconds(dtype) -> float:
        images, kernel = tf.ones((64, 16, 16, 64), dtype), tf.ones((3, 3, 64, 64), dtype)
        start = time.perf_counter()
        with tf.GradientTape() as tape:
            tape.watch((images, kernel))
            out = tf.nn.conv2d(images, kernel, 1, "SAME")
        gradients = tape.gradient(out, (images, kernel))
        float(tf.cast(gradients[0][0, 0, 0, 0] + gradients[1][0, 0, 0, 0], tf.float32))  # waits for the result
        return time.perf_counter() - start

    try:  # in turn, so that other work on the machine slows both; the fastest of each is the undisturbed one
        times = np.array([(seconds(tf.float32), seconds(tf.bfloat16)) for _ in range(repeats)]).min(axis=0)
    except tf.errors.OpError:  # no bfloat16 kernel on this device
        return "float32"
    return "mixed_bfloat16" if times[1] * 1.2 < times[0] else "float32"
