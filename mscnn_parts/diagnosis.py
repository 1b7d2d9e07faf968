"""Looks inside a network that trains badly: gradients, weights, activations and statistics on one batch, and findings.

Reference
    Ioffe & Szegedy, "Batch Normalization", ICML 2015 (moving statistics).
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
from mscnn_parts.data import Split
from mscnn_parts.data_checks import Finding, check_training, findings_text
from mscnn_parts.figures import new_axes
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
KERNEL = "further kernel"  # the kind of a line that is no layer
NORMALIZING = (keras.layers.BatchNormalization, FusedBatchNormalization)


class Spread(NamedTuple):
    """Describes many numbers; a NaN or infinity among them shows in it."""

    mean: float
    std: float
    largest: float  # absolute value

    def __str__(self) -> str:
        return f"{self.mean:.1g} ± {self.std:.2g}"


class LayerReport(NamedTuple):
    """Describes one layer on the batch; None stands for what it does not have.

    It looks at the layer's kernel, or without one at its first trainable weight. A layer of several kernels, such as a
    nested model, has a line for each further one, with its gradient and weights alone.
    """

    name: str  # of the layer, or the path of a further kernel
    kind: str
    gradient: Spread | None
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
        """The names of the findings."""
        return {finding.name for finding in self.findings}

    def __str__(self) -> str:
        lines = [
            f"{self.network}: loss {self.loss:.3g} (guessing: {self.guessing:.3g}), accuracy {self.accuracy:.1%}",
            "each as mean ± standard deviation, then the largest absolute value",
            f"{'layer':22}{'gradient':>17}{'largest':>9}{'weights':>16}{'largest':>9}{'output':>15}{'dead':>10}",
        ]
        for layer in (one for one in self.layers if one.weights or one.units):
            cells = []
            for spread, width in ((layer.gradient, 17), (layer.weights, 16)):
                cells.append(f"{spread!s:>{width}}{spread.largest:9.2g}" if spread else " " * (width + 9))
            dead = "" if layer.dead is None else f"{layer.dead} of {layer.units}"
            lines.append(f"{layer.name[-21:]:22}{''.join(cells)}{layer.activation or ''!s:>15}{dead:>10}")
        return "\n".join([*lines, findings_text(self.findings)])


# ---- one batch through the network


class _Pass(NamedTuple):
    """Holds what was measured on one batch, most of it by a layer's name. Spreads are (mean, std, largest)."""

    logits: tf.Tensor  # (B, C)
    loss: tf.Tensor
    gradients: dict[str, tf.Tensor]  # (3,), by line of the report
    weights: dict[str, tf.Tensor]  # (3,), by line of the report
    activations: dict[str, tf.Tensor]  # (3,)
    samples: dict[str, tf.Tensor]  # some outputs of a layer with a kernel, flat
    live: dict[str, tf.Tensor]  # bool (units,): whether a unit of a ReLU is ever positive
    apart: dict[str, tf.Tensor]  # see `_statistics_apart`
    seen: tuple[tf.Tensor, ...]  # root mean square, least and largest of what the first kernel sees


def _watched(network: keras.Model, category: int | None) -> Callable[..., _Pass]:
    """Builds the function (images, labels) -> `_Pass` of a network, eager or for `tf.function`.

    It goes forward and back in inference mode: so neither statistics nor random numbers move.
    """
    if not getattr(network, "inputs", None):
        raise MSCNNError(f"{network.name} is no functional or Sequential model: diagnose its parts, such as .stage1.")
    layers = [layer for layer in network.layers if not isinstance(layer, keras.layers.InputLayer)]
    probe = keras.Model(network.inputs[0], [{one.name: (one.input, one.output) for one in layers}, network.outputs[0]])
    first = next((layer.name for layer in layers if _has_kernel(layer)), layers[0].name)

    def watched(images: tf.Tensor, labels: tf.Tensor) -> _Pass:
        trained = {line: weight for layer in layers for line, weight in _watched_weights(layer).items()}
        with tf.GradientTape() as tape:
            tensors, logits = probe(images, training=False)
            logits = tf.cast(logits, tf.float32)  # (B, C)
            loss = _loss(logits, labels, category)
        gradients = tape.gradient(loss, {name: weight.value for name, weight in trained.items()})
        samples = {name: _sample(output) for name, (_, output) in tensors.items()}
        seen = tf.cast(tensors[first][0], tf.float32)
        return _Pass(
            logits, loss, {name: _spread(one) for name, one in gradients.items() if one is not None},
            {name: _spread(weight.value) for name, weight in trained.items()},
            {name: _spread(sample) for name, sample in samples.items()},
            {name: one for name, one in samples.items() if name in trained and len(trained[name].shape) > 1},
            {layer.name: _live(tensors[layer.name][1]) for layer in layers if _is_relu(layer)},
            {one.name: _statistics_apart(one, tensors[one.name][0]) for one in layers if isinstance(one, NORMALIZING)},
            (tf.sqrt(tf.reduce_mean(seen**2)), tf.reduce_min(seen), tf.reduce_max(seen)),
        )  # fmt: skip

    return watched


def _loss(logits: tf.Tensor, labels: tf.Tensor, category: int | None) -> tf.Tensor:
    if category is None:
        return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
    correct = tf.cast(labels == category, tf.float32)
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(correct, log_odds_tensor(logits, category)))


def _watched_weights(layer: keras.Layer) -> dict[str, keras.Variable]:
    """The kernel of a layer, or else its first trainable weight, by the layer's name; further kernels by their path."""
    first, *others = sorted(layer.trainable_weights, key=lambda weight: len(weight.shape) < 2) or [None]
    further = {weight.path: weight for weight in others if len(weight.shape) > 1}
    return {} if first is None else {layer.name: first, **further}


def _has_kernel(layer: keras.Layer) -> bool:
    return isinstance(layer, WhiteningConv) or any(len(weight.shape) > 1 for weight in layer.weights)


def _is_relu(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.ReLU) or getattr(layer, "activation", None) is keras.activations.relu


def _live(output: tf.Tensor) -> tf.Tensor:
    return tf.reduce_any(output > 0, axis=list(range(len(output.shape) - 1)))


def _sample(output: tf.Tensor) -> tf.Tensor:
    """Takes some 65,000 values of an output, float32: enough for its spread and shape, and faster than millions."""
    flat = tf.reshape(output, [-1])
    step = -(-tf.size(flat) // SAMPLED_VALUES) // 2 * 2 + 1  # odd, so that it meets all channels, mostly even in number
    return tf.cast(flat[::step], tf.float32)


def _spread(values: tf.Tensor) -> tf.Tensor:
    flat = tf.reshape(tf.cast(tf.convert_to_tensor(values), tf.float32), [-1])
    mean, variance = tf.nn.moments(flat, 0)
    return tf.stack([mean, tf.sqrt(variance), tf.reduce_max(tf.abs(flat))])


def _statistics_apart(layer: keras.Layer, inputs: tf.Tensor) -> tf.Tensor:
    """Mean over channels of |difference of means| / std of the batch + |log of the ratio of standard deviations|."""
    axes = list(range(len(inputs.shape) - 1))
    mean, variance = tf.nn.moments(tf.cast(inputs, tf.float32), axes)  # (channels,) each
    stored_mean, stored = (tf.convert_to_tensor(v.value) for v in (layer.moving_mean, layer.moving_variance))
    epsilon = layer.epsilon
    means = tf.abs(mean - stored_mean) / tf.sqrt(variance + epsilon)
    return tf.reduce_mean(means + 0.5 * tf.abs(tf.math.log((stored + epsilon) / (variance + epsilon))))


def diagnose(
    network: keras.Model, images: np.ndarray, labels: np.ndarray, category: int | None = None,
    train: Split | None = None, held: Split | None = None, negatives: tuple[np.ndarray, np.ndarray] | None = None,
) -> Report:  # fmt: skip
    """Measures a network on one batch of its training, and names what is wrong. Nothing in the network changes.

    Args:
        network: functional or Sequential, from images (or features) to logits (B, C): a Stage 1, a verifier, your own.
        images: as the network takes them, (B, ...); 64 to 256 are enough.
        labels: categories as integers (B,).
        category: the network is the verifier of this category, whose question is 'is it c?'; None: a classifier.
        train, held, negatives: for the faults that no batch shows, see `check_training`; its findings come first.

    Raises:
        MSCNNError: the network hides its layers, labels are no categories of it, or as `check_training` says.
    """
    watched = _watched(network, category)
    labels = _checked(network, images, labels)
    report = _report(network, watched(tf.convert_to_tensor(images), tf.constant(labels)), labels, category)
    if any(one is not None for one in (train, held, negatives)):
        report.findings[:0] = check_training(train, held, negatives, category)
    return report


def _checked(network: keras.Model, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise MSCNNError(f"labels are {labels.shape} for {len(images)} images: give one integer per image, (B,).")
    check_categories_within(labels, network.output_shape[-1])
    return labels.astype(np.int64)


def _report(network: keras.Model, measured: _Pass, labels: np.ndarray, category: int | None) -> Report:
    batch = tf.nest.map_structure(np.asarray, measured)
    layers = [line for one in network.layers if one.name in batch.activations for line in _lines_of(one, batch)]
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


def _lines_of(layer: keras.Layer, batch: _Pass) -> list[LayerReport]:
    """The lines of one layer: its own, and one for each further kernel."""
    name, watched, histogram, fan_in = layer.name, _watched_weights(layer), None, None

    def spreads(line: str) -> list[Spread | None]:
        parts = (batch.gradients, batch.weights, batch.activations)
        return [Spread(*map(float, part[line])) if line in part else None for part in parts]

    if name in batch.samples:
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)  # each output sees a single channel
        values, fan_in = batch.samples[name], int(np.prod(watched[name].shape[: 2 if depthwise else -1]))
        histogram = np.histogram(values[np.isfinite(values)], HISTOGRAM_BINS)
    live = batch.live.get(name)
    dead, units = (None, None) if live is None else (int((~live).sum()), len(live))
    own = LayerReport(name, type(layer).__name__, *spreads(name), histogram, fan_in, dead, units)
    return [own, *(LayerReport(line, KERNEL, *spreads(line), *[None] * 4) for line in watched if line != name)]


# ---- findings, causes before their consequences


def _input_findings(network: keras.Model, batch: _Pass) -> list[Finding]:
    """Checks that the first kernel sees values of the order of 1."""
    first = next((layer.name for layer in network.layers if _has_kernel(layer)), None)
    size, least, largest = map(float, batch.seen)
    if first is None or not size > LARGE_INPUT:
        return []
    evidence = f"the first kernel sees values from {least:.3g} to {largest:.3g}"
    remedy = "Standardize inside the model: keras.layers.Rescaling(1 / std, -mean / std), of the train split."
    return [Finding("input not normalized", first, evidence, remedy)]


def _number_findings(report: Report) -> list[Finding]:
    parts = [(one, name, getattr(one, name)) for one in report.layers for name in ("weights", "gradient", "activation")]
    broken = [(layer, name) for layer, name, spread in parts if spread and not np.isfinite(spread.std + spread.largest)]
    if broken:
        layer, name = broken[0]
        remedy = "Usually the learning rate is too large: try a tenth. Else look for a division by 0 or a log of 0."
        return [Finding("not finite", layer.name, f"NaN or infinity in its {name}, {len(broken)} such in all", remedy)]
    return []


def _statistics_findings(network: keras.Model, batch: _Pass) -> list[Finding]:
    """Checks that what BatchNormalization has stored is what passes through it."""
    apart = {name: float(value) for name, value in batch.apart.items()}
    still = {name: remedy for name in apart if (remedy := _standstill(network.get_layer(name)))}
    worst = max(still or apart, key=apart.__getitem__, default=None)
    if worst is None or not (still or apart[worst] > STATISTICS_APART):
        return []
    evidence = "they cannot follow the training, and are" if still else "moving mean and variance are"
    remedy = still.get(worst) or (
        "They have not followed the training: lower its momentum, train longer, or, in a loop of your "
        "own, call the network with training=True. Frozen ones have to fit the data from the start."
    )
    evidence = f"{evidence} {apart[worst]:.2g} apart from those of the batch"
    return [Finding("statistics do not fit", worst, evidence, remedy)]


def _standstill(layer: keras.Layer) -> str:
    """What to do about statistics of a BatchNormalization that no training moves; "" if they move, or came with it."""
    if layer.trainable:
        return "A momentum of 1 keeps the first values forever: 0.9 lets them follow." if layer.momentum == 1 else ""
    as_built = not np.any(layer.moving_mean) and np.all(np.asarray(layer.moving_variance) == 1)
    return "It is frozen with the 0 and 1 that it was built with: free it, or load its statistics." if as_built else ""


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
    kernels = [one for one in report.layers if (one.histogram is not None or one.kind == KERNEL) and one.gradient]
    small = [layer for layer in kernels if layer.gradient.largest < VANISHING]
    large = [layer for layer in kernels if layer.gradient.largest > EXPLODING]
    if small and not learned:
        share = f"{len(small)} of {len(kernels)} layers"
        evidence = f"at most {small[0].gradient.largest:.1g}, below {VANISHING:g}, in {share}"
        remedy = "Look for dead units; use shortcuts, BatchNormalization, He's initialization, fewer layers."
        found.append(Finding("vanishing gradients", small[0].name, evidence, remedy))
    if large:
        share = f"{len(large)} of {len(kernels)} layers"
        evidence = f"up to {large[0].gradient.largest:.3g}, above {EXPLODING:g}, in {share}"
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

    Afterwards `reports` has a `Report` per epoch, `seconds` what each has taken, `epoch_seconds` how long the epochs
    took without them, and `start_seconds` the time for making the graph that all of them use.
    """

    BATCH = 64

    def __init__(self, images: np.ndarray, labels: np.ndarray, category: int | None = None):
        super().__init__()
        self.images, self.labels = images[: self.BATCH], np.asarray(labels[: self.BATCH])
        self.category = category

    def on_train_begin(self, logs=None):
        self.reports, self.seconds, self.epoch_seconds, self.told = [], [], [], set()
        begun = time.perf_counter()
        self.network = getattr(self.model, "network", self.model)  # of a `Trainer`
        watched = tf.function(_watched(self.network, self.category), autograph=False)
        self.labels = _checked(self.network, self.images, self.labels)
        batch = tf.convert_to_tensor(self.images), tf.constant(self.labels)
        graph = watched.get_concrete_function(*batch)
        self.measure = lambda: graph(*batch)
        self.measure()  # TensorFlow prunes the graph when it first runs
        self.start_seconds = time.perf_counter() - begun

    def on_epoch_begin(self, epoch, logs=None):
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        begun = time.perf_counter()
        report = _report(self.network, self.measure(), self.labels, self.category)
        for finding in report.findings:
            if finding.name not in self.told:
                print(f"After epoch {epoch + 1}: {finding}", flush=True)
        self.told |= report.names
        self.reports.append(report)
        self.epoch_seconds.append(begun - self.begun)
        self.seconds.append(time.perf_counter() - begun)


def plot_diagnosis(report: Report) -> Figure:
    """Draws gradients, weights and dead units of each layer with a kernel, and the histogram of its output."""
    layers = [layer for layer in report.layers if layer.histogram is not None]
    columns = max(3, min(len(layers), 5))
    figure, axes = new_axes(1 - (-len(layers) // columns), columns, 2.4, 2.0)
    names, places = [layer.name for layer in layers], np.arange(len(layers))
    gradients = [np.clip(layer.gradient.largest if layer.gradient else 0, 1e-9, 1e9) for layer in layers]
    relus = [layer for layer in report.layers if layer.units]
    panels = (
        ("largest gradient", names, gradients), ("weights / start", names, [layer.growth for layer in layers]),
        ("dead share", [layer.name for layer in relus], [layer.dead / layer.units for layer in relus]),
    )  # fmt: skip
    for axis, (title, labels, values) in zip(axes, panels):  # noqa: B905 - there may be more axes
        axis.barh(np.arange(len(values)), np.nan_to_num(values, posinf=0), color="C0")
        axis.set_yticks(np.arange(len(values)), [label[:14] for label in labels], fontsize=8)
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
        axis.locator_params(axis="x", nbins=4)
    findings = ", ".join(finding.name for finding in report.findings) or "no findings"
    figure.suptitle(f"{report.network}, loss {report.loss:.3g}: {findings}", fontsize=10)
    return figure
