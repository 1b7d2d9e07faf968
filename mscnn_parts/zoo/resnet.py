"""Residual networks of basic blocks (He et al. 2016): each block adds to what it is given."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from mscnn_parts.layers import BatchNormalization

WIDTHS = (64, 128, 256, 512)


def build(
    x: keras.KerasTensor, categories: int, policy: str, blocks: Sequence[int] = (2, 3, 4, 2)
) -> keras.KerasTensor:
    """Scaled images (B, H, W, channels) -> logits (B, categories).

    The larger the images, the sooner they are shrunk: up to 48 pixels not at all before the first block, up to 128 to
    a half, larger ones to a quarter.

    Args:
        blocks: how many of each of the four widths; each has two convolutions.
    """
    layers, size = keras.layers, x.shape[1]
    x = layers.Conv2D(64, 7, 1 if size <= 48 else 2, padding="same", use_bias=False, dtype=policy)(x)
    x = BatchNormalization(dtype=policy)(x)
    x = layers.ReLU(dtype=policy, name="block1")(x)
    if size > 128:
        x = layers.MaxPooling2D(3, 2, padding="same", dtype=policy)(x)
    for stack, (width, count) in enumerate(zip(WIDTHS, blocks, strict=True), start=1):
        for i in range(count):
            last = (stack, i) == (len(WIDTHS), count - 1)
            x = basic_block(
                x, width, 2 if stack > 1 and i == 0 else 1, policy, "features" if last else f"add{stack}_{i}"
            )
    x = layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(x)  # (B, 512)
    return layers.Dense(categories, dtype="float32", name="logits")(x)


def basic_block(x: keras.KerasTensor, width: int, stride: int, policy: str, name: str) -> keras.KerasTensor:
    """Two 3 x 3 convolutions and a shortcut, by a 1 x 1 convolution where size or width changes."""
    layers, shortcut = keras.layers, x
    if stride > 1 or x.shape[-1] != width:
        shortcut = layers.Conv2D(width, 1, stride, use_bias=False, dtype=policy)(x)
        shortcut = BatchNormalization(dtype=policy)(shortcut)
    x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False, dtype=policy)(x)
    x = BatchNormalization(dtype=policy)(x)
    x = layers.ReLU(dtype=policy)(x)
    x = layers.Conv2D(width, 3, padding="same", use_bias=False, dtype=policy)(x)
    x = BatchNormalization(dtype=policy)(x)
    return layers.ReLU(dtype=policy, name=name)(layers.Add(dtype=policy)([x, shortcut]))
