"""Seven 3 x 3 convolutions in three blocks, after VGG (Simonyan & Zisserman 2015), with BatchNormalization."""

from __future__ import annotations

import keras

from mscnn_parts.layers import BatchNormalization


def build(x: keras.KerasTensor, categories: int, policy: str) -> keras.KerasTensor:
    """Scaled images (B, H, W, channels) -> logits (B, categories)."""
    layers = keras.layers
    for block, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3)), start=1):
        for i in range(depth):
            last = i == depth - 1
            name = ("features" if block == 3 else f"block{block}") if last else None
            x = layers.Conv2D(width, 3, padding="same", dtype=policy)(x)
            x = BatchNormalization(dtype=policy)(x)
            x = layers.ReLU(dtype=policy, name=name)(x)
        x = layers.MaxPooling2D(2, dtype=policy)(x)
    x = layers.Flatten(dtype=policy)(x)
    x = layers.Dense(512, dtype=policy)(x)
    x = BatchNormalization(dtype=policy)(x)
    x = layers.ReLU(dtype=policy)(x)
    x = layers.Dropout(0.5, dtype=policy)(x)
    return layers.Dense(categories, dtype="float32", name="logits")(x)
