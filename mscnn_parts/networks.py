"""Builds the networks of both stages: the project's own CNN, those of the zoo, and the Stage 2 heads."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Sequence

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.layers import (
    Beside,
    Conv2D,
    FusedBatchNormalization,
    RandomFlipCrop,
    ReverseChannels,
    WhiteningConv,
)
from mscnn_parts.settings import MSCNNError
from mscnn_parts.zoo import OWN, Network, network_named

STAGE1_WIDTHS = (64, 256, 256)  # 118 million multiply-adds an image of 32 x 32 x 3
STAGE2_WIDTHS = (32, 64, 64)  # 17 million
OWN_INPUT = "own_input"  # the layer whose output one's own network is given
HEAD_WIDTH = 64  # of a Stage 2 head
CAFFE_MEAN = (103.939, 116.779, 123.68)  # of the channels of ImageNet, blue first, in pixel values
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # red first


def widths_for(size: int, widths: Sequence[int]) -> tuple[int, ...]:
    """The widths of the blocks for images of `size` pixels: those for 32, after a narrow block for each doubling.

    So the blocks behind see maps of the size they were designed for, and the cost grows by little.
    """
    more = max(0, round(np.log2(size / 32)))
    return tuple(max(16, widths[0] // 2 ** (more - i)) for i in range(more)) + tuple(widths)


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
    size: int = 0,
    quarter_turns: bool = False,
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
        size: pixels to which smaller images are enlarged; 0: as they are.
        quarter_turns: whether training turns images.
    """
    layers = keras.layers
    inputs = x = keras.Input(tuple(input_shape), dtype="uint8")
    x = _enlarged(RandomFlipCrop(flip, quarter_turns=quarter_turns, name="augmentation")(x), size)
    scale, shift = [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]
    x = layers.Rescaling(scale, shift, dtype="float32", name="normalization")(x)
    x = WhiteningConv(name="whitening", dtype=policy)(x)  # (B, H-1, W-1, 8 * channels)
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


def build_stages(
    network: str | keras.Model,
    stage2_branch: int,
    stage1_widths: Sequence[int],
    stage2_widths: Sequence[int],
    logit_scale: float,
    activation: str,
    **common,
) -> tuple[keras.Model, keras.Model, Callable[..., keras.Model]]:
    """Stage 1, the Stage 2 base network, and the function that builds a Stage 2 network of a name.

    Args:
        network: see `MultiStageCNN`. stage2_branch, stage2_widths: of `stage2_design`.
        stage1_widths: of `build_cnn`; empty: those for the size.
        common: input_shape, categories, mean, std, flip, policy, size and quarter_turns, see `build_cnn`.
    """
    entry = network_named(network)
    compact = functools.partial(build_cnn, logit_scale=logit_scale, activation=activation, **common)
    if network == "compact":
        stage1 = compact(name="stage1", widths=stage1_widths or widths_for(common["size"], STAGE1_WIDTHS))
    else:
        stage1 = build_network(network if entry is OWN else entry, **common)
    if entry.pretrained and stage2_branch < 0:
        features = stage1.get_layer("pooled").output.shape[-1]
        build = functools.partial(build_head, features=features, categories=common["categories"])
        return stage1, build("stage2_base"), build
    build = functools.partial(compact, widths=stage2_widths)
    base = build("stage2_base")
    cut = branching_layer(base, stage2_branch)
    return stage1, base, functools.partial(build_branch, base=base, cut=cut) if cut else build


def _enlarged(images: keras.KerasTensor, size: int) -> keras.KerasTensor:
    if size in (0, images.shape[1]):
        return images
    resizing = keras.layers.Resizing(size, size, dtype="float32", name="enlarged")  # (B, size, size, channels)
    return resizing(images, training=False)  # its default is True, which the layers behind it would inherit


def build_network(
    network: Network | keras.Model,
    input_shape: Sequence[int],
    categories: int,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool,
    policy: str,
    size: int,
    quarter_turns: bool = False,
    name: str = "stage1",
) -> keras.Model:
    """A network of the zoo, or one's own, as a Stage 1: uint8 images (B, H, W, channels) -> float32 logits (B, C).

    Beside it stand the whitening filters of `build_cnn`, for the OOD score.

    Args:
        network: an entry of `zoo.NETWORKS`; or a model from float32 images (B, size, size, channels) of 0 to 255 to
            logits, which scales its input itself.
        mean, std, flip, policy, size, quarter_turns: see `build_cnn`.
    """
    layers, own = keras.layers, isinstance(network, keras.Model)
    inputs = x = keras.Input(tuple(input_shape), dtype="uint8")
    x = _enlarged(RandomFlipCrop(flip, quarter_turns=quarter_turns, name="augmentation")(x), size)
    normal = layers.Rescaling(
        [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)], dtype="float32", name="standardized"
    )(x)
    whitened = WhiteningConv(name="whitening", dtype="float32")(normal)
    whitened = layers.Activation("relu", dtype="float32", name="whitened")(whitened)
    if not own:
        x = Beside(dtype="float32")([scaled(x, normal, network), whitened])
        return keras.Model(inputs, network.build(x, categories, policy, **network.variant), name=name)
    # What is inside one's own is not known: means and variances of the colors stand for its first block.
    squares = layers.Multiply(dtype="float32")([normal, normal])
    colors = layers.Concatenate(dtype="float32", name="block1")([normal, squares])  # (B, H, W, 2 channels)
    wanted = getattr(network, "input_shape", None) or x.shape  # a subclass may not know its own
    if any(size not in (None, given) for size, given in zip(wanted[1:], x.shape[1:], strict=True)):
        raise MSCNNError(f"{network.name} takes images {wanted[1:]}, not {x.shape[1:]}: choose image_size to fit.")
    x = Beside(dtype="float32", name=OWN_INPUT)([Beside(dtype="float32")([x, whitened]), colors])
    logits = network(x)
    if tuple(logits.shape[1:]) != (categories,):
        raise MSCNNError(f"{network.name} gives {tuple(logits.shape)}: it has to give {categories} logits per image.")
    return keras.Model(inputs, layers.Identity(dtype="float32", name="logits")(logits), name=name)


def scaled(images: keras.KerasTensor, normal: keras.KerasTensor, network: Network) -> keras.KerasTensor:
    """Images (B, H, W, channels) of 0 to 255 as a network of the zoo was made to see them."""
    layers = keras.layers
    if network.three_channels and images.shape[-1] == 1:
        images = layers.Concatenate(dtype="float32")([images] * 3)
    if network.scaling == "standardized":  # by the mean and the standard deviation of the data set
        return normal
    if network.scaling == "around zero":
        return layers.Rescaling(1 / 128, -127 / 128, dtype="float32")(images)
    if network.scaling == "imagenet":
        shift = [-m / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
        return layers.Rescaling([1 / s for s in IMAGENET_STD], shift, dtype="float32")(images)
    if network.scaling == "caffe":
        return layers.Rescaling(1.0, [-m for m in CAFFE_MEAN], dtype="float32")(
            ReverseChannels(dtype="float32")(images)
        )
    return images


def build_head(name: str, features: int, categories: int) -> keras.Model:
    """A Stage 2 network on Stage 1's pooled features: float32 (B, features) -> logits (B, C)."""
    layers = keras.layers
    inputs = x = keras.Input((features,))
    x = layers.BatchNormalization(dtype="float32")(x)
    x = layers.Dropout(0.3, dtype="float32")(x)
    x = layers.Dense(HEAD_WIDTH, activation="relu", dtype="float32", name="hidden")(x)
    return keras.Model(inputs, layers.Dense(categories, dtype="float32", name="logits")(x), name=name)


def stage2_design(
    network: str | keras.Model, size: int, widths: Sequence[int], stage2_branch: int
) -> tuple[tuple[int, ...], int]:
    """The widths of the Stage 2 CNNs' blocks, and how many they share: -1 stands for the features of Stage 1.

    Args:
        network, stage2_branch: see `MultiStageCNN`. size: of the images, in pixels. widths: (): those for the size.

    Raises:
        MSCNNError: there are not so many blocks.
    """
    entry = network_named(network)
    widths = tuple(widths or entry.stage2_widths or widths_for(size, STAGE2_WIDTHS))
    if not isinstance(stage2_branch, (int, np.integer)) or not -1 <= stage2_branch <= len(widths):
        raise MSCNNError(
            f"stage2_branch is {stage2_branch}: the Stage 2 CNNs have {len(widths)} blocks, so give 0 to {len(widths)} "
            "or -1, the default."
        )
    if stage2_branch == -1:
        stage2_branch = -1 if entry.pretrained else len(widths) - 1
    return widths, stage2_branch


def unnamed_branch(network: str | dict) -> int:
    """The `stage2_branch` of a model file that names none, because it is older; `network` is of its configuration."""
    return -1 if network_named(network).pretrained else 0


def branching_layer(base: keras.Model, behind: int) -> str:
    """The layer of the Stage 2 base network behind which its branches begin: that of a block, or the last features.

    Args:
        behind: number of blocks before it; 0: none, so that there are no branches ("").
    """
    blocks = [layer.name for layer in base.layers if layer.name.startswith("block")]
    return "" if not behind else "pooled" if behind == len(blocks) else blocks[behind - 1]


def build_branch(name: str, base: keras.Model, cut: str) -> keras.Model:
    """A new network of the kind of the layers of `base` behind the layer `cut`: features (B, ...) -> logits (B, C)."""
    features = base.get_layer(cut).output
    inputs = x = keras.Input(features.shape[1:], dtype=features.dtype)
    for layer in base.layers[base.layers.index(base.get_layer(cut)) + 1 :]:  # they are a chain
        x = type(layer).from_config({**layer.get_config(), "trainable": True})(x)  # the base may be frozen
    return keras.Model(inputs, x, name=name)


def layers_by_group(stage1: keras.Model, network: Network) -> dict[str, list[keras.layers.Layer]]:
    """The layers with weights of each group of a network of the zoo, and its last layers under "head"."""
    groups = {str(i): begins for i, begins in enumerate(network.groups)}
    weighted = [layer for layer in stage1.layers if layer.weights and layer.name != "whitening"]
    found = {group: [one for one in weighted if one.name.startswith(begins)] for group, begins in groups.items()}
    return found | {"head": [stage1.get_layer("logits")]}


def sees_images(network: keras.Model) -> bool:
    """Whether a network sees uint8 images, not the features of a trunk."""
    return network.inputs[0].dtype == "uint8"


def trunk_of(stage1: keras.Model, base: keras.Model, stage2_branch: int) -> keras.Model | None:
    """What all Stage 2 networks share, from images to features (B, ...); None: nothing, each sees the images."""
    owner, cut = (base, branching_layer(base, stage2_branch)) if sees_images(base) else (stage1, "pooled")
    return keras.Model(owner.inputs[0], owner.get_layer(cut).output) if cut else None


def weights_behind(base: keras.Model, network: keras.Model) -> list[np.ndarray]:
    """The weights of the Stage 2 base network that a Stage 2 network of its kind has as its own."""
    return base.get_weights()[-len(network.weights) :]


def on_images(stage1: keras.Model, base: keras.Model, network: keras.Model) -> keras.Model:
    """A Stage 2 network as one from uint8 images (B, H, W, channels), with a copy of what all share."""
    if sees_images(network):
        return network
    if not sees_images(base):  # a head on Stage 1's features
        return keras.Model(stage1.inputs[0], network(stage1.get_layer("pooled").output), name=network.name)
    whole = keras.models.clone_model(base)
    whole.set_weights([*base.get_weights()[: -len(network.weights)], *network.get_weights()])
    return whole


def feature_extractor(stage1: keras.Model, trunk: keras.Model | None = None) -> keras.Model:
    """From uint8 images (B, H, W, channels) to Stage 1's view of them, float32 (B, C + T + 2 D + K).

    Side by side: C logits; the means of the T channels of the first block; the means of the 2 D whitened
    channels, D filters and their negatives; the K features, flattened, that a trunk shows to Stage 2.
    """
    layers = keras.layers
    block1_means, whitened = (
        layers.GlobalAveragePooling2D(dtype="float32")(stage1.get_layer(name).output) for name in ("block1", "whitened")
    )
    parts = [stage1.outputs[0], block1_means, whitened]
    if trunk is not None:
        own = trunk.inputs[0] is stage1.inputs[0]
        features = trunk.outputs[0] if own else trunk(stage1.inputs[0])  # so that Stage 1 runs once
        parts.append(layers.Flatten(dtype="float32")(features))
    return keras.Model(stage1.inputs[0], layers.Concatenate(dtype="float32")(parts))


def set_whitening(networks: Iterable[keras.Model], images: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
    """Gives networks the whitening kernel of some train images, uint8 (N, H, W, channels): of 32 pixels about 5,000.

    Those that see features have none.
    """
    filtering = [network for network in networks if sees_images(network)]
    size = filtering[0].get_layer("whitening").input.shape[1]
    few = max(200, 5000 * 32**2 // size**2)
    sample = images[:: -(-len(images) // few)]  # from all over: images may be sorted by category
    sample = sample if size == sample.shape[1] else np.asarray(tf.image.resize(sample, (size, size)))
    kernel = whitening_kernel(sample, mean, std)
    for network in filtering:
        network.get_layer("whitening").kernel.assign(kernel)


def whitening_kernel(images: np.ndarray, mean: np.ndarray, std: np.ndarray, epsilon: float = 5e-4) -> np.ndarray:
    """The kernel of `WhiteningConv`, float32 (2, 2, channels, 8 * channels), from uint8 images (N, H, W, channels)."""
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
