"""Large kernels and quick pooling, after AlexNet (Krizhevsky et al. 2012), with one dense layer for CAM to read."""

from __future__ import annotations

import keras


def build(x: keras.KerasTensor, categories: int, policy: str) -> keras.KerasTensor:
    """Scaled images (B, H, W, channels) -> logits (B, categories)."""
    layers = keras.layers
    x = layers.Conv2D(64, 11, 4, padding="same", activation="relu", dtype=policy, name="block1")(x)  # (B, H/4, W/4, 64)
    x = layers.MaxPooling2D(2, padding="same", dtype=policy)(x)
    x = layers.Conv2D(192, 5, padding="same", activation="relu", dtype=policy, name="block2")(x)
    x = layers.MaxPooling2D(2, padding="same", dtype=policy)(x)
    x = layers.Conv2D(384, 3, padding="same", activation="relu", dtype=policy, name="features")(x)  # (B, H/16, ...)
    x = layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(x)  # (B, 384)
    return layers.Dense(categories, dtype="float32", name="logits")(x)
