"""Looks inside a network that trains badly: gradients, weights, activations and statistics on one batch, and findings.

References
    Ioffe & Szegedy, "Batch Normalization", ICML 2015 (moving statistics).
    Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014 (occlusion).
    Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018 (randomized weights).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.checks import check_categories_within
from mscnn_parts.data_checks import Finding, findings_text
from mscnn_parts.figures import _axes
from mscnn_parts.layers import FusedBatchNormalization, WhiteningConv, log_odds_tensor
from mscnn_parts.settings import MSCNNError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VANISHING, EXPLODING = 1e-6, 100.0  # of the largest absolute gradient of a kernel
DEAD_SHARE = 0.5  # of a layer's units; some units are silent on a batch in healthy networks, too
LARGE_WEIGHTS = 8.0  # times the standard deviation with which He's initialization starts
LARGE_INPUT = 10.0  # of the root mean square of what the first kernel sees; standardized input has 1
STATISTICS_APART = 1.5  # mean distance of BatchNormalization's statistics from the batch's, see `_statistics_apart`
HISTOGRAM_BINS, SAMPLED_VALUES = 50, 2**16
NORMALIZING = (keras.layers.BatchNormalization, FusedBatchNormalization)


class Spread(NamedTuple):
    """Of many numbers; NaN and infinities make it so."""

    mean: float
    std: float
    largest: float  # absolute value


class LayerReport(NamedTuple):
    """One layer on the batch; None for what it does not have."""

    name: str
    kind: str
    gradient: Spread | None  # of its kernel, or of its first trainable weight
    weights: Spread | None
    activation: Spread | None
    histogram: tuple[np.ndarray, np.ndarray] | None  # counts (50,) and edges (51,) of its output: with a kernel only
    fan_in: int | None  # inputs of an output of its kernel
    dead: int | None  # units (channels) of a ReLU that are zero on the whole batch
    units: int | None

    @property
    def growth(self) -> float:
        """The standard deviation of the kernel as a multiple of that with which He's initialization starts."""
        return self.weights.std / np.sqrt(2 / self.fan_in) if self.weights and self.fan_in else 0.0


@dataclass(frozen=True)
class Report:
    """What `diagnose` has measured, and what it finds wrong; `str` of it is for a person."""

    network: str
    loss: float  # on the batch, in nats
    guessing: float  # the loss of one that knows nothing
    accuracy: float
    layers: list[LayerReport]
    findings: list[Finding]

    @property
    def names(self) -> set[str]:
        """Of the findings."""
        return {finding.name for finding in self.findings}

    def __str__(self) -> str:
        lines = [
            f"{self.network}: loss {self.loss:.3g} (guessing: {self.guessing:.3g}), accuracy {self.accuracy:.1%}",
            f"{'layer':30}{'gradient: std':>14}{'largest':>10}{'weights: std':>14}{'output: std':>13}{'dead':>10}",
        ]
        for layer in (one for one in self.layers if one.weights or one.units):
            spreads = (layer.gradient, layer.weights, layer.activation)
            gradient, weights, output = (spread and f"{spread.std:.2g}" for spread in spreads)
            largest = layer.gradient and f"{layer.gradient.largest:.2g}"
            dead = "" if layer.dead is None else f"{layer.dead} of {layer.units}"
            cells = f"{gradient or '':>14}{largest or '':>10}{weights or '':>14}{output or '':>13}{dead:>10}"
            lines.append(f"{layer.name[:29]:30}{cells}")
        return "\n".join([*lines, findings_text(self.findings)])


def _spread(values: tf.Tensor | np.ndarray) -> Spread:
    flat = tf.reshape(tf.cast(values, tf.float32), [-1])
    mean, variance = tf.nn.moments(flat, 0)
    return Spread(float(mean), float(tf.sqrt(variance)), float(tf.reduce_max(tf.abs(flat))))


# ---- one batch through the network


class _Pass(NamedTuple):
    """What one batch does in a network."""

    logits: np.ndarray  # (B, C)
    loss: tf.Tensor
    gradients: dict[str, tf.Tensor]  # by the path of a trainable weight
    outputs: dict[str, tf.Tensor]  # by the name of a layer
    inputs: dict[str, tf.Tensor]


def _run(network: keras.Model, images: np.ndarray, labels: np.ndarray, category: int | None) -> _Pass:
    """Forward and back, in inference mode: so neither statistics nor random numbers move."""
    layers = [layer for layer in network.layers if not isinstance(layer, keras.layers.InputLayer)]
    around = {layer.name: (layer.input, layer.output) for layer in layers}
    probe = keras.Model(network.inputs[0], [around, network.outputs[0]])
    with tf.GradientTape() as tape:
        tensors, logits = probe(images, training=False)
        logits = tf.cast(logits, tf.float32)  # (B, C)
        loss = _loss(logits, labels, category)
    weights = network.trainable_weights
    gradients = zip(weights, tape.gradient(loss, [weight.value for weight in weights]), strict=True)
    by_path = {weight.path: tf.convert_to_tensor(gradient) for weight, gradient in gradients if gradient is not None}
    outputs = {name: pair[1] for name, pair in tensors.items()}
    inputs = {name: pair[0] for name, pair in tensors.items()}
    return _Pass(logits.numpy(), loss, by_path, outputs, inputs)


def _loss(logits: tf.Tensor, labels: np.ndarray, category: int | None) -> tf.Tensor:
    if category is None:
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    correct = tf.constant(labels == category, tf.float32)
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(correct, log_odds_tensor(logits, category)))


def diagnose(network: keras.Model, images: np.ndarray, labels: np.ndarray, category: int | None = None) -> Report:
    """Measures a network on one batch of its training, and names what is wrong. Nothing in the network changes.

    Args:
        network: functional or Sequential, from images (or features) to logits (B, C): a Stage 1, a verifier, your own.
        images: as the network takes them, (B, ...); 64 to 256 are enough.
        labels: categories as integers (B,).
        category: the network is the verifier of this category, whose question is 'is it c?'; None: a classifier.

    Raises:
        MSCNNError: the network's layers cannot be looked into, or labels are no categories of it.
    """
    if not getattr(network, "inputs", None):
        raise MSCNNError(f"{network.name} is no functional or Sequential model: diagnose its parts, such as .stage1.")
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise MSCNNError(f"labels are {labels.shape} for {len(images)} images: give one integer per image, (B,).")
    check_categories_within(labels, network.output_shape[-1])
    batch = _run(network, images, labels.astype(np.int64), category)
    layers = [_layer_report(layer, batch) for layer in network.layers if layer.name in batch.outputs]
    if category is None:
        accuracy, guessing = (batch.logits.argmax(axis=1) == labels).mean(), np.log(batch.logits.shape[1])
    else:
        says = log_odds_tensor(tf.constant(batch.logits), category).numpy() > 0
        accuracy, guessing = (says == (labels == category)).mean(), np.log(2)
    report = Report(network.name, float(batch.loss), float(guessing), float(accuracy), layers, [])
    findings = [
        *_input_findings(network, batch), *_number_findings(report), *_weight_findings(report),
        *_statistics_findings(network, batch), *_unit_findings(report), *_gradient_findings(report),
        *_guessing_findings(report),
    ]  # fmt: skip
    report.findings.extend(findings)
    return report


def _layer_report(layer: keras.Layer, batch: _Pass) -> LayerReport:
    kernel = next((weight for weight in layer.trainable_weights if len(weight.shape) > 1), None)
    weight = kernel if kernel is not None else next(iter(layer.trainable_weights), None)
    gradient = batch.gradients.get(weight.path) if weight is not None else None
    output = batch.outputs[layer.name]
    sample = _sample(output)
    dead = units = histogram = fan_in = None
    if _is_relu(layer):
        live = tf.reduce_any(output > 0, axis=list(range(len(output.shape) - 1)))  # (channels,)
        dead, units = int(tf.reduce_sum(tf.cast(~live, tf.int32))), int(live.shape[0])
    if kernel is not None:
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)  # each output sees a single channel
        values, fan_in = sample.numpy(), int(np.prod(kernel.shape[: 2 if depthwise else -1]))
        histogram = np.histogram(values[np.isfinite(values)], HISTOGRAM_BINS)
    return LayerReport(
        layer.name, type(layer).__name__, None if gradient is None else _spread(gradient),
        None if weight is None else _spread(weight.value), _spread(sample), histogram, fan_in, dead, units,
    )  # fmt: skip


def _is_relu(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.ReLU) or getattr(layer, "activation", None) is keras.activations.relu


def _sample(output: tf.Tensor) -> tf.Tensor:
    """Some 65,000 values of an output, float32: enough for its spread and shape, and far faster than millions."""
    flat = tf.reshape(output, [-1])
    step = -(-len(flat) // SAMPLED_VALUES) | 1  # odd, so that it meets all channels, whose number is mostly even
    return tf.cast(flat[::step], tf.float32)


# ---- findings, causes before their consequences


def _input_findings(network: keras.Model, batch: _Pass) -> list[Finding]:
    """What the first kernel sees should be of the order of 1."""
    first = next((one for one in network.layers if _has_kernel(one)), None)
    if first is None:
        return []
    seen = tf.cast(batch.inputs[first.name], tf.float32)
    size = float(tf.sqrt(tf.reduce_mean(seen**2)))
    if not size > LARGE_INPUT:
        return []
    evidence = f"the first kernel sees values from {float(tf.reduce_min(seen)):.3g} to {float(tf.reduce_max(seen)):.3g}"
    remedy = "Standardize inside the model: keras.layers.Rescaling(1 / std, -mean / std), of the train split."
    return [Finding("input not normalized", first.name, evidence, remedy)]


def _has_kernel(layer: keras.Layer) -> bool:
    return isinstance(layer, WhiteningConv) or any(len(weight.shape) > 1 for weight in layer.weights)


def _number_findings(report: Report) -> list[Finding]:
    parts = [
        (layer, name, spread)
        for layer in report.layers
        for name in ("weights", "gradient", "activation")
        if (spread := getattr(layer, name)) is not None
    ]
    broken = [(layer, name) for layer, name, spread in parts if not np.isfinite(spread.std + spread.largest)]
    if broken:
        layer, name = broken[0]
        remedy = "Usually the learning rate is too large: try a tenth. Else look for a division by 0 or a log of 0."
        return [Finding("not finite", layer.name, f"NaN or infinity in its {name}, {len(broken)} such in all", remedy)]
    return []


def _statistics_findings(network: keras.Model, batch: _Pass) -> list[Finding]:
    """BatchNormalization: whether what it has stored is what passes through it."""
    apart = {
        layer.name: _statistics_apart(layer, batch.inputs[layer.name])
        for layer in network.layers
        if isinstance(layer, NORMALIZING) and layer.name in batch.inputs
    }
    worst = max(apart, key=apart.get, default=None)
    if worst is None or not apart[worst] > STATISTICS_APART:
        return []
    evidence = f"moving mean and variance are {apart[worst]:.2g} apart from those of the batch"
    remedy = (
        "They have not followed the training: lower its momentum, train longer, or see that they move "
        "(training=True, and non-trainable weights are updated). Frozen ones have to fit the data from the start."
    )
    return [Finding("statistics do not fit", worst, evidence, remedy)]


def _statistics_apart(layer: keras.Layer, inputs: tf.Tensor) -> float:
    """Mean over channels of |difference of means| / std of the batch + |log of the ratio of standard deviations|."""
    axes = list(range(len(inputs.shape) - 1))
    mean, variance = tf.nn.moments(tf.cast(inputs, tf.float32), axes)  # (channels,) each
    stored_mean, stored = (tf.convert_to_tensor(v.value) for v in (layer.moving_mean, layer.moving_variance))
    epsilon = layer.epsilon
    means = tf.abs(mean - stored_mean) / tf.sqrt(variance + epsilon)
    return float(tf.reduce_mean(means + 0.5 * tf.abs(tf.math.log((stored + epsilon) / (variance + epsilon)))))


def _unit_findings(report: Report) -> list[Finding]:
    dead = [layer for layer in report.layers if layer.units and layer.dead > DEAD_SHARE * layer.units]
    if not dead:
        return []
    evidence = f"{dead[0].dead} of {dead[0].units} units are 0 on the whole batch, as in {len(dead)} layers in all"
    remedy = (
        "A ReLU that is never positive learns no more: start anew with a smaller learning rate, biases of 0 and "
        "He's initialization, or use BatchNormalization or a leaky ReLU."
    )
    return [Finding("dead units", dead[0].name, evidence, remedy)]


def _gradient_findings(report: Report) -> list[Finding]:
    found, learned = [], report.loss < 0.1 * report.guessing  # then gradients are small, as they should be
    kernels = [layer for layer in report.layers if layer.histogram is not None and layer.gradient is not None]
    small = [layer for layer in kernels if layer.gradient.largest < VANISHING]
    large = [layer for layer in kernels if layer.gradient.largest > EXPLODING]
    if small and not learned:
        evidence = (
            f"at most {small[0].gradient.largest:.1g}, below {VANISHING:g}, in {len(small)} of {len(kernels)} layers"
        )
        remedy = "Look for dead units; use shortcuts, BatchNormalization, He's initialization, fewer layers."
        found.append(Finding("vanishing gradients", small[0].name, evidence, remedy))
    if large:
        evidence = (
            f"up to {large[0].gradient.largest:.3g}, above {EXPLODING:g}, in {len(large)} of {len(kernels)} layers"
        )
        remedy = "Standardize the input, lower the learning rate, or set the optimizer's clipnorm to 1."
        found.append(Finding("exploding gradients", large[0].name, evidence, remedy))
    return found


def _weight_findings(report: Report) -> list[Finding]:
    heavy = [layer for layer in report.layers if layer.growth > LARGE_WEIGHTS]
    if not heavy:
        return []
    evidence = f"their standard deviation is {heavy[0].growth:.0f} times that of He's initialization"
    remedy = "The steps were too large: start anew with a tenth of the learning rate, or find it as in notebook 07."
    return [Finding("weights too large", heavy[0].name, evidence, remedy)]


def _guessing_findings(report: Report) -> list[Finding]:
    if not report.loss > 0.97 * report.guessing:
        return []
    evidence = f"loss {report.loss:.3g}, guessing has {report.guessing:.3g}"
    remedy = "Untrained? Else check the labels (check_labels_fit), then the learning rate, up and down."
    return [Finding("no better than guessing", "output", evidence, remedy)]


# ---- after every epoch


class Diagnosis(keras.callbacks.Callback):
    """Diagnoses the network on a fixed batch after every epoch, and prints a finding when it first comes up.

    Args:
        images, labels: of the train split; the first 64 are used, so that it costs little beside an epoch.
        category: see `diagnose`.

    Afterwards `reports` has a `Report` per epoch, and `seconds` what each has taken.
    """

    BATCH = 64

    def __init__(self, images: np.ndarray, labels: np.ndarray, category: int | None = None):
        super().__init__()
        self.images, self.labels = images[: self.BATCH], np.asarray(labels[: self.BATCH])
        self.category = category

    def on_train_begin(self, logs=None):
        self.reports, self.seconds, self.told = [], [], set()

    def on_epoch_end(self, epoch, logs=None):
        begun = time.perf_counter()
        network = getattr(self.model, "network", self.model)  # of a `Trainer`
        report = diagnose(network, self.images, self.labels, self.category)
        for finding in report.findings:
            if finding.name not in self.told:
                print(f"After epoch {epoch + 1}: {finding}", flush=True)
        self.told |= report.names
        self.reports.append(report)
        self.seconds.append(time.perf_counter() - begun)


def plot_diagnosis(report: Report) -> Figure:
    """Gradients, weights and dead units of each layer with a kernel, and the histogram of its output."""
    layers = [layer for layer in report.layers if layer.histogram is not None]
    columns = max(3, min(len(layers), 5))
    figure, axes = _axes(1 - (-len(layers) // columns), columns, 2.4, 2.0)
    names, places = [layer.name for layer in layers], np.arange(len(layers))
    gradients = [np.clip(layer.gradient.largest if layer.gradient else 0, 1e-9, 1e9) for layer in layers]
    relus = [layer for layer in report.layers if layer.units]
    panels = (
        ("largest gradient", names, gradients), ("weights / start", names, [layer.growth for layer in layers]),
        ("dead share", [layer.name for layer in relus], [layer.dead / layer.units for layer in relus]),
    )  # fmt: skip
    for axis, (title, labels, values) in zip(axes, panels):  # noqa: B905 - there may be more axes
        axis.barh(np.arange(len(values)), np.nan_to_num(values, posinf=0), color="C0")
        axis.set_yticks(np.arange(len(values)), [label[:14] for label in labels], fontsize=6)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="x", labelsize=7)
    axes[0].set_xscale("log")
    for bound in (VANISHING, EXPLODING):
        axes[0].axvline(bound, color="firebrick", linestyle=":")
    axes[1].axvline(LARGE_WEIGHTS, color="firebrick", linestyle=":")
    axes[2].axvline(DEAD_SHARE, color="firebrick", linestyle=":")
    axes[2].set_xlim(0, 1)
    for axis in axes[3:]:
        axis.set_axis_off()
    for place in places:
        axis, (counts, edges) = axes[columns + place], layers[place].histogram
        axis.set_axis_on()
        axis.stairs(counts, edges, fill=True, color="C1")
        axis.set_title(f"{names[place][:18]}: output", fontsize=8)
        axis.tick_params(labelsize=7, labelleft=False, left=False)
    findings = ", ".join(finding.name for finding in report.findings) or "no findings"
    figure.suptitle(f"{report.network}, loss {report.loss:.3g}: {findings}", fontsize=10)
    return figure


# ---- explanations without gradients


def occlusion(network: keras.Model, images: np.ndarray, target: Callable, size: int = 8, stride: int = 4) -> np.ndarray:
    """How far a target falls when a square of the image is covered with the image's mean color.

    Source: Zeiler & Fergus 2014, section 4.2.

    Args:
        images: uint8 (B, H, W, channels). target: as of `grad_cam`. size, stride: of the square, in pixels.

    Returns:
        float32 (B, h, w); positive where the square speaks for the target.
    """
    height, width = images.shape[1:3]
    tops, lefts = (range(0, max(1, side - size + 1), stride) for side in (height, width))
    maps = []
    for image in images:
        covered = np.repeat(image[None], len(tops) * len(lefts) + 1, axis=0)  # (1 + h w, H, W, channels)
        for number, (top, left) in enumerate(np.ndindex(len(tops), len(lefts)), start=1):
            place = np.s_[number, tops[top] : tops[top] + size, lefts[left] : lefts[left] + size]
            covered[place] = image.mean(axis=(0, 1))
        values = np.asarray(target(network(covered, training=False)), np.float32)  # (1 + h w,)
        maps.append((values[0] - values[1:]).reshape(len(tops), len(lefts)))
    return np.stack(maps)


def randomized(network: keras.Model, seed: int = 0) -> keras.Model:
    """The same network as it was before any training: an explanation that stays the same explains nothing of it.

    Source: Adebayo et al. 2018. What is not trained, scaling and whitening, is kept.
    """
    keras.utils.set_random_seed(seed)
    copy = keras.models.clone_model(network)
    for layer, own in zip(network.layers, copy.layers, strict=True):
        if isinstance(layer, WhiteningConv):
            own.set_weights(layer.get_weights())
    return copy
