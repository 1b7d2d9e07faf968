"""The layers of the CNNs."""

from __future__ import annotations

import functools

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.kernels import images_per_row, short_rows_convolution
from mscnn_parts.settings import MSCNNError

RANDOM_FLIP = -1  # in place of an epoch
serializable = keras.saving.register_keras_serializable(package="mscnn")


@serializable
class RandomFlipCrop(keras.layers.Layer):
    """Mirrors half of the images and shifts each by up to `shift` pixels, in training only.

    By default `shift` is a sixteenth of the side, and 2 at least.

    From uint8 (B, H, W, channels) to float32. The border is filled by reflection. Two gathers do it, which costs far
    less than Keras' general affine layers. They and the arithmetic on the places of pixels use floats: on a GPU
    TensorFlow gathers no uint8 from a tensor, and computes with int32 on the host.

    Which images are mirrored is random, or alternates: while `epoch` is 0 or more, each image is mirrored in every
    second epoch, so that two epochs show both of its views. Which comes first, the parity of its sum decides.
    Source: alternating flip (Jordan 2024, section 3.6).

    With `quarter_turns`, each image is also turned by 0 to 3 quarters, at random; images must be square.

    While `crop_fraction` is below 1, training sees a random part of each image, that share of its height and its width.
    """

    def __init__(
        self, flip: bool = True, shift: int | None = None, seed: int = 0, quarter_turns: bool = False, **kwargs
    ):
        super().__init__(**{"dtype": "float32", "autocast": False, **kwargs})
        self.flip, self.shift, self.seed, self.quarter_turns = flip, shift, seed, quarter_turns
        self.random = keras.random.SeedGenerator(seed)
        self.epoch = tf.Variable(RANDOM_FLIP, trainable=False)  # not weights: no model file needs them
        with tf.device("CPU"):  # the bounds of a draw are needed there
            self.crop_fraction = tf.Variable(1.0, trainable=False)

    def reset(self) -> None:
        """Back to whole images, mirrored at random: as it is outside of a training by epochs."""
        self.epoch.assign(RANDOM_FLIP)
        self.crop_fraction.assign(1.0)

    def reseed(self, seed: int) -> None:
        """Starts the random numbers anew, also for a graph that has been traced already."""
        self.random.state.assign([seed, 0])

    def build(self, input_shape):
        if self.quarter_turns and input_shape[1] != input_shape[2]:
            size = f"{input_shape[1]} x {input_shape[2]}"
            raise MSCNNError(f"quarter_turns takes square images; these have {size} pixels.")

    def call(self, images, training=False):
        images = tf.cast(images, tf.float32)
        if not training:
            return images
        batch, (height, width) = tf.shape(images)[0], images.shape[1:3]
        rows, columns = self._places(batch, height), self._places(batch, width)
        if self.flip:
            columns = tf.where(self._mirrored(images)[:, None], width - 1 - columns, columns)
        if self.quarter_turns:  # 1: transpose, reverse rows; 2: reverse both; 3: transpose, reverse columns
            quarters = tf.floor(keras.random.uniform((batch,), 0, 4, dtype="float32", seed=self.random))
            transposed = tf.transpose(images, (0, 2, 1, 3))  # (B, W, H, channels)
            images = tf.where((quarters % 2 == 1)[:, None, None, None], transposed, images)
            rows = tf.where(((quarters == 1) | (quarters == 2))[:, None], height - 1 - rows, rows)
            columns = tf.where((quarters >= 2)[:, None], width - 1 - columns, columns)
        images = tf.gather(images, tf.cast(rows, tf.int64), axis=1, batch_dims=1)  # (B, crop H, W, channels)
        return tf.gather(images, tf.cast(columns, tf.int64), axis=2, batch_dims=1)  # (B, crop H, crop W, channels)

    def _mirrored(self, images):
        """Which images are mirrored: bool (B,)."""
        at_random = keras.random.uniform((tf.shape(images)[0],), dtype="float32", seed=self.random) < 0.5
        total = tf.reduce_sum(images % 2, axis=(1, 2, 3))  # as odd as the sum, and exact in float32 at any size
        in_turn = (total + tf.cast(self.epoch, tf.float32)) % 2 == 1
        return tf.where(self.epoch == RANDOM_FLIP, at_random, in_turn)

    def _places(self, batch, size: int):
        """Which row (or column) each row of the result is taken from, reflected at the border: (B, crop size)."""
        shift = max(2, size // 16) if self.shift is None else self.shift
        kept = tf.round(self.crop_fraction * size)
        end = shift + size - tf.cast(kept, tf.int32) + 1
        start = keras.random.randint((batch, 1), -shift, end, dtype="int32", seed=self.random)
        return (size - 1) - tf.abs((size - 1) - tf.abs(tf.cast(start, tf.float32) + tf.range(kept)))

    def get_config(self):
        own = {name: getattr(self, name) for name in ("flip", "shift", "seed", "quarter_turns")}
        return {**super().get_config(), **own}


@serializable
class WhiteningConv(keras.layers.Layer):
    """2 x 2 convolution whose fixed kernel decorrelates neighbouring pixels; nothing in it is trained.

    The kernel comes from `whitening_kernel`. Filters are the eigenvectors of the patches and their
    negatives, so 8 a channel. Source: airbench (Jordan 2024, section 3.2), which also trains a bias for a while. Here
    nothing is trained, so that no gradient has to be taken back through the first 3x3 convolution, and the bias is 0:
    TensorFlow makes one operation of convolution, bias and activation, at two fifths of the time on CPU.
    """

    def build(self, input_shape):
        channels = input_shape[-1]
        self.kernel = self.add_weight(shape=(2, 2, channels, 8 * channels), trainable=False, name="kernel")
        # A variable, for a constant 0 would be optimized away before the three are joined; no weight of the layer.
        self.bias = tf.Variable(tf.zeros(8 * channels, self.compute_dtype), trainable=False)

    def call(self, images):
        return tf.nn.bias_add(keras.ops.conv(images, self.kernel, padding="valid"), self.bias)  # (B, H-1, W-1, 8 ch.)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        batch, height, width, channels = input_shape
        return (batch, height - 1, width - 1, 8 * channels)


def batch_normalize(
    layer: keras.layers.Layer, maps: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, training: bool
) -> tf.Tensor:
    """Maps (B, H, W, channels), normalized in one operation by the statistics of the batch or the layer's moving ones.

    In training the layer's statistics move, unless it is frozen. Their variance is the unbiased one, as in PyTorch.

    Args:
        layer: it has epsilon, momentum, moving_mean and moving_variance. scale, offset: float32 (channels,).
    """
    fused = tf.raw_ops.FusedBatchNormV3
    normalize = functools.partial(fused, x=maps, scale=scale, offset=offset, epsilon=layer.epsilon)
    if not (training and layer.trainable):
        mean, variance = (tf.convert_to_tensor(v.value) for v in (layer.moving_mean, layer.moving_variance))
        return normalize(mean=mean, variance=variance, is_training=False).y
    result = normalize(mean=[], variance=[], is_training=True)
    for moving, now in ((layer.moving_mean, result.batch_mean), (layer.moving_variance, result.batch_variance)):
        moving.assign(moving.value * layer.momentum + now * (1 - layer.momentum))
    return result.y


@serializable
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' `BatchNormalization`; of maps (B, H, W, channels) in one operation, which is faster on CPU.

    Of maps, the variance that moves is the unbiased one, as in PyTorch, and so is the momentum.
    """

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-3, **kwargs):
        super().__init__(momentum=momentum, epsilon=epsilon, **kwargs)

    def call(self, inputs, training=None, mask=None):
        if len(inputs.shape) != 4 or self.axis not in (-1, 3) or not (self.scale and self.center):
            return super().call(inputs, training, mask)
        scale, offset = (tf.convert_to_tensor(v.value) for v in (self.gamma, self.beta))
        return batch_normalize(self, inputs, scale, offset, training)


@serializable
class FusedBatchNormalization(keras.layers.Layer):
    """BatchNormalization in one fused operation, without scale and with a fast offset.

    Keras' own layer is several operations on CPU. The scale is left out and the offset is stored divided by
    `OFFSET_GAIN`, which multiplies its learning rate by the square of that (both Jordan 2024, section 3.4). The
    statistics forget within some ten batches, so that they are true after a short training.
    """

    OFFSET_GAIN = 8.0  # learning rate x 64

    def __init__(self, momentum: float = 0.9, epsilon: float = 1e-3, **kwargs):
        super().__init__(**kwargs)
        self.momentum, self.epsilon = momentum, epsilon

    def build(self, input_shape):
        # Statistics stay float32 under mixed precision: a running mean in bfloat16 would stop moving.
        state = {"shape": (input_shape[-1],), "dtype": "float32", "autocast": False}
        self.offset = self.add_weight(initializer="zeros", name="offset", **state)
        self.moving_mean = self.add_weight(initializer="zeros", name="moving_mean", trainable=False, **state)
        self.moving_variance = self.add_weight(initializer="ones", name="moving_variance", trainable=False, **state)

    def call(self, inputs, training=False):
        offset = tf.convert_to_tensor(self.offset.value) * self.OFFSET_GAIN  # (channels,)
        return batch_normalize(self, inputs, tf.ones_like(offset), offset, training)

    def compute_output_shape(self, input_shape: tuple) -> tuple:  # Keras would trace a graph to know it
        return input_shape

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "epsilon": self.epsilon}


@serializable
class Beside(keras.layers.Layer):
    """Hands on its first input; the second stays in the network, for whoever asks a layer for its output."""

    def call(self, inputs):
        return inputs[0]


@serializable
class ReverseChannels(keras.layers.Layer):
    """RGB -> BGR, in which some networks were trained."""

    def call(self, images):
        return images[..., ::-1]  # (B, H, W, channels)


@serializable
class Conv2D(keras.layers.Conv2D):
    """Keras' `Conv2D`, faster in training: on CPU, in bfloat16, where rows are short, by `gradient_of_kernel`."""

    def build(self, input_shape):
        super().build(input_shape)
        plain = self.kernel_size == (3, 3) and self.strides == self.dilation_rate == (1, 1) and self.padding == "same"
        on_cpu = self.compute_dtype == "bfloat16" and not tf.config.list_physical_devices("GPU")
        width = input_shape[2]  # None: of any size
        self.short_rows = plain and on_cpu and bool(width) and images_per_row(width) > 2

    def convolution_op(self, inputs, kernel):
        convolve = short_rows_convolution if self.short_rows else super().convolution_op
        return convolve(inputs, tf.convert_to_tensor(kernel))  # (B, H, W, filters)


def log_odds_tensor(logits: tf.Tensor, category: tf.Tensor | int) -> tf.Tensor:
    """As `log_odds`, for tensors and one category: float32 (B, C) -> (B,)."""
    others = tf.one_hot(category, tf.shape(logits)[1], on_value=-np.inf, off_value=0.0)  # (C,)
    return tf.gather(logits, category, axis=1) - tf.reduce_logsumexp(logits + others, axis=1)


class LogOdds(keras.layers.Layer):
    """Logits (B, C) -> log-odds of one category (B,); the category can be changed without a new graph."""

    def __init__(self):
        super().__init__()
        self.category = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False)

    def call(self, logits):
        return log_odds_tensor(logits, tf.convert_to_tensor(self.category.value))
