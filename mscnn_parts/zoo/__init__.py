"""The networks that Stage 1 can be: a file for each kind, and an entry in `NETWORKS`.

A file has `build(x, categories, policy, ...)`, from scaled images (B, H, W, channels) to logits (B, C) as Keras
tensors. It names three layers: `block1`, an early feature map, whose channel means are the block 1 term of the OOD
score; `features`, the last feature map, for Class Activation Maps; and `logits`. A network whose features the Stage 2
heads share also names `pooled`, the means of `features`.

To add a network, write such a file and add an entry here; tests/test_zoo.py holds the one against the other.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Network(NamedTuple):
    """An entry: what is to be known of a network before it is built, without loading Keras."""

    module: str  # the file in this folder; "" for the project's own
    image_size: int  # pixels, its own
    parameters: int  # to train, with ten categories
    multiply_adds: int  # of one image of its own size, with the whitening filters of every network
    text: str
    variant: Mapping[str, Any] = NOTHING  # further arguments of `build`
    scaling: str = "standardized"  # of its input, see `networks.scaled`
    groups: tuple[tuple[str, ...], ...] = ()  # beginnings of the names of layers, from input to output, to unfreeze
    recipe: Mapping[str, Any] = NOTHING  # what differs from the default recipe
    stage2_widths: tuple[int, ...] = ()  # of the Stage 2 CNNs; (): those of compact at this size
    pretrained: bool = False  # ImageNet weights: Stage 2 are heads on its features
    least_size: int = 16  # pixels below which it has nothing left to pool
    three_channels: bool = False  # gray images are given as three equal channels

    def _function(self, name: str) -> Callable:
        return getattr(importlib.import_module(f"mscnn_parts.zoo.{self.module}"), name)

    @property
    def build(self) -> Callable:
        return self._function("build")

    @property
    def load_weights(self) -> Callable:
        """Fills a built network with the weights that it was trained with on ImageNet."""
        return self._function("load_weights")

    def check_weights(self) -> None:
        """Raises MSCNNError if its ImageNet weights are not on disk and cannot be downloaded."""
        if self.pretrained:
            self._function("check_weights")(**self.variant)


ADAM = {"optimizer": "adam", "optimizer_rate": 1e-3, "optimizer_decay": 1e-4, "label_smoothing": 0.0}
SGD = {"optimizer": "sgd", "optimizer_rate": 0.05, "optimizer_decay": 5e-4, "label_smoothing": 0.1}
MUON = {"optimizer": "muon", "label_smoothing": 0.1}  # for networks with BatchNormalization behind each convolution
STAGED = {**ADAM, "label_smoothing": 0.1}
LITE0_GROUPS = (
    ("stem",), ("block0_",), ("block1_", "block2_"), ("block3_", "block4_"), ("block5_", "block6_", "block7_"),
    ("block8_", "block9_", "block10_"), ("block11_", "block12_", "block13_", "block14_"), ("block15_",), ("top",),
)  # fmt: skip
B0_GROUPS = (("stem", "rescaling", "normalization"), *((f"block{i}",) for i in range(1, 8)), ("top",))
RESNET50_GROUPS = (("conv1",), ("conv2",), ("conv3",), ("conv4",), ("conv5",))
DENSENET_GROUPS = (("conv1", "pool1"), ("conv2", "pool2"), ("conv3", "pool3"), ("conv4", "pool4"), ("conv5", "bn"))

NETWORKS: dict[str, Network] = {
    "compact": Network(
        "", 32, 1_971_338, 118_147_360, "the project's own: whitening, six convolutions, one dense layer",
    ),
    "classic": Network(
        "classic", 32, 1_341_226, 39_963_936, "three blocks of two convolutions, dropout, dense 512",
        recipe=ADAM, stage2_widths=(16, 32),
    ),
    "mnist": Network("mnist", 28, 184_586, 3_893_280, "two 5 x 5 convolutions, dense 128", recipe=ADAM),
    "mnist_bn": Network(
        "mnist", 28, 391_370, 7_771_936, "three convolutions with BatchNormalization, dense 256",
        {"normalized": True}, recipe=ADAM,
    ),
    "vgg": Network("vgg", 32, 3_841_610, 192_892_192, "seven 3 x 3 convolutions, dense 512", recipe=MUON),
    "alexnet": Network(
        "alexnet", 96, 998_474, 84_109_344, "three convolutions with large kernels, one dense layer", recipe=ADAM,
    ),
    "resnet": Network(
        "resnet", 32, 13_838_410, 790_056_224, "24 layers with shortcuts", {"blocks": (2, 3, 4, 2)}, recipe=SGD,
    ),
    "resnet18": Network(
        "resnet", 32, 11_181_642, 563_563_808, "18 layers with shortcuts", {"blocks": (2, 2, 2, 2)}, recipe=SGD,
    ),
    "resnet34": Network(
        "resnet", 32, 21_289_802, 1_167_543_584, "34 layers with shortcuts", {"blocks": (3, 4, 6, 3)}, recipe=SGD,
    ),
    "efficientnet_lite0": Network(
        "efficientnet_lite0", 160, 3_383_818, 203_164_928, "ImageNet weights from the extra `transfer`",
        scaling="around zero", groups=LITE0_GROUPS, recipe=STAGED, pretrained=True, three_channels=True,
    ),
    "efficientnet_b0": Network(
        "applications", 224, 4_020_358, 398_869_504, "ImageNet weights that Keras downloads",
        {"name": "EfficientNetB0"}, "none", B0_GROUPS, recipe=STAGED, pretrained=True, three_channels=True,
    ),
    "resnet50": Network(
        "applications", 224, 23_555_082, 3_870_267_680, "ImageNet weights that Keras downloads",
        {"name": "ResNet50"}, "caffe", RESNET50_GROUPS, recipe=STAGED, pretrained=True, three_channels=True,
    ),
    "densenet121": Network(
        "applications", 224, 6_964_106, 2_847_469_856, "ImageNet weights that Keras downloads",
        {"name": "DenseNet121"}, "imagenet", DENSENET_GROUPS, recipe=STAGED, pretrained=True, least_size=32,
        three_channels=True,
    ),
}  # fmt: skip
OWN = Network("", 0, 0, 0, "a network of one's own", recipe=ADAM)


def network_named(network: Any) -> Network:
    """The entry of a model's network by its name; another name, or the network itself, is one of one's own."""
    return NETWORKS.get(network, OWN) if isinstance(network, str) else OWN
