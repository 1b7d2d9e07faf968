"""Networks of `keras.applications`, with ImageNet weights that Keras downloads."""

from __future__ import annotations

import re
import socket

import keras

from mscnn_parts.downloads import DOWNLOAD_TIMEOUT
from mscnn_parts.layers import Beside
from mscnn_parts.settings import MSCNNError

EARLY = {"EfficientNetB0": "stem_activation", "ResNet50": "conv1_relu", "DenseNet121": "conv1_relu"}
OF_ITS_OWN = {"EfficientNetB0": "block7a_project_conv", "ResNet50": "conv5_block3_3_conv",
              "DenseNet121": "conv5_block16_2_conv"}  # fmt: skip


def build(x: keras.KerasTensor, categories: int, policy: str, name: str) -> keras.KerasTensor:
    """Scaled images (B, H, W, 3) -> logits (B, categories).

    Args:
        name: of the function in `keras.applications`.
    """
    layers = keras.layers
    body = getattr(keras.applications, name)(include_top=False, weights=None, input_tensor=x)
    early = layers.Identity(dtype="float32", name="block1")(body.get_layer(EARLY[name]).output)
    x = Beside(dtype="float32", name="features")([body.output, early])
    x = layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(x)
    return layers.Dense(categories, dtype="float32", name="logits")(x)


def load_weights(network: keras.Model) -> None:
    """Fills the layers before `pooled` with the ImageNet weights.

    Raises:
        MSCNNError: they are not on disk and cannot be downloaded.
    """
    mine = {_plain(layer.name): layer for layer in network.layers}
    name = next(one for one, layer in OF_ITS_OWN.items() if layer in mine)
    for layer in _with_weights(name).layers:
        if layer.weights:
            mine[_plain(layer.name)].set_weights(layer.get_weights())
    if name == "EfficientNetB0":
        # Keras' form with ImageNet weights has a layer more: it divides by the roots of these (TensorFlow issue 49930).
        variance = mine["normalization"].adapt_variance
        variance.assign(variance * keras.ops.array((0.229, 0.224, 0.225)))
        mine["normalization"].finalize_state()  # what it computes with


def check_weights(name: str) -> None:
    """Raises MSCNNError if the weights are not in Keras' cache and cannot be downloaded; a download stays there."""
    _with_weights(name)


def _with_weights(name: str) -> keras.Model:
    """A network of `keras.applications` without its last layer, with ImageNet weights.

    Raises:
        MSCNNError: they are not on disk and cannot be downloaded.
    """
    waits = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # Keras would wait for a silent server without an end
    try:
        return getattr(keras.applications, name)(include_top=False, weights="imagenet")
    except Exception as error:  # of the network, the file system, HDF5
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise MSCNNError(
            f"The ImageNet weights of {name} are not on disk, and Keras cannot download them: {reason}.\n"
            "Try again online, or choose --stage1 efficientnet_lite0, whose weights are a package (from Python also "
            "weights=None: random ones)."
        ) from error
    finally:
        socket.setdefaulttimeout(waits)


def _plain(name: str) -> str:
    """A layer's name without the number that Keras gives to layers of no name of their own."""
    return re.sub(r"^(normalization|rescaling)_\d+$", r"\1", name)
