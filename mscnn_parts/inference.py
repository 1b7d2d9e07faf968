"""Graphs over images, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from mscnn_parts.settings import MSCNNError

WEAKEST_STRENGTH = 1e-3  # of a whitening filter, whose usual strength is about 1: what is below is the same, flat


def _read(handle, like):
    """The value of the variable with a handle, which does not tell its type and shape: those of the variable `like`."""
    value = tf.raw_ops.ReadVariableOp(resource=handle, dtype=like.dtype)
    value.set_shape(like.shape)
    return value


def _in_batches(graph: Callable, images: np.ndarray, batch_size: int, width: int) -> np.ndarray:
    """Runs a graph over images, `batch_size` (1 or more) at a time: (N, ...) -> float32 (N, width).

    A batch of more than 8 is filled up to a multiple of 8, so that few shapes occur: each new one
    costs the libraries below TensorFlow some milliseconds of preparation.
    """
    if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise MSCNNError(f"batch_size is {batch_size}: it is a number of images, a whole number from 1 on.")
    results = [np.zeros((0, width), np.float32)]
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = -len(batch) % 8 if len(batch) > 8 else 0
        filled = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch
        results.append(graph(tf.constant(filled)).numpy()[: len(batch)])
    return np.concatenate(results)
