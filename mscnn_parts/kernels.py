"""The gradient of a convolution's kernel where rows are short."""

from __future__ import annotations

import tensorflow as tf


@tf.custom_gradient
def short_rows_convolution(images: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """3 x 3 convolution: (B, H, W, in), (3, 3, in, out) -> (B, H, W, out)."""

    def backward(output_gradient):  # (B, H, W, out)
        of_images = tf.nn.conv2d_transpose(output_gradient, kernel, tf.shape(images), 1, "SAME")
        return of_images, gradient_of_kernel(images, output_gradient)

    return tf.nn.conv2d(images, kernel, 1, "SAME"), backward


def gradient_of_kernel(images: tf.Tensor, output_gradient: tf.Tensor) -> tf.Tensor:
    """Gradient of a 3 x 3 convolution's kernel, from images laid side by side.

    oneDNN, TensorFlow's library on CPU, sums along a row of places, in tiles that hold 32 bfloat16: rows of 7 or 3
    leave them nearly empty. So images are joined to rows about as long as a tile, with a column of zeros between
    them, which adds nothing to the sum.

    Args:
        images: input of the convolution, (B, H, W, in).
        output_gradient: gradient of its output, (B, H, W, out).

    Returns:
        (3, 3, in, out).
    """
    count = images_per_row(tf.shape(images)[2])
    return tf.raw_ops.Conv2DBackpropFilter(
        input=pack_rows(images, count), filter_sizes=(3, 3, images.shape[-1], output_gradient.shape[-1]),
        out_backprop=pack_rows(output_gradient, count), strides=[1] * 4, padding="SAME",
    )  # fmt: skip


def images_per_row(width: int) -> int:
    """How many images, with a column of zeros after each, fill a row of 32 places."""
    return 32 // (width + 1)


def pack_rows(images: tf.Tensor, count: int) -> tf.Tensor:
    """(B, H, W, C) -> (B / count, H, count (W + 1), C): a column of zeros after each image, zeros for those missing."""
    batch, height, width, channels = (*tf.unstack(tf.shape(images)[:3]), images.shape[-1])
    padded = tf.pad(images, [[0, -batch % count], [0, 0], [0, 1], [0, 0]])
    rows = tf.reshape(padded, (-1, count, height, (width + 1) * channels))
    return tf.reshape(tf.transpose(rows, (0, 2, 1, 3)), (-1, height, count * (width + 1), channels))
