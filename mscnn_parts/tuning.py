"""The craft of training: what notebook 07 finds, draws, compares and searches.

Keras has optimizers, schedules, augmentation layers and callbacks, Optuna the search; here is what they lack.

References
    Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (range test, cyclic rate).
    Smith & Topin, "Super-Convergence", 2018 (one cycle).
    Akiba et al., "Optuna", KDD 2019.
"""

from __future__ import annotations

import functools
import os
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from mscnn_parts.figures import new_axes
from mscnn_parts.layers import RandomFlipCrop, serializable
from mscnn_parts.optimizers import Muon, Recipe, WarmupLinearDecay
from mscnn_parts.runs import device_name, versions
from mscnn_parts.settings import MSCNNError

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

SMOOTHING = 0.9  # of the loss in a range test: what a step leaves of the mean before it
DIVERGED = 4.0  # times the least loss: then a range test stops


# ---- the learning rate finder


class RangeTest(NamedTuple):
    """What `find_learning_rate` has seen; the arrays have a value per step taken."""

    rates: np.ndarray  # float64
    losses: np.ndarray  # float64
    smoothed: np.ndarray  # float64
    diverged: bool  # whether the loss rose far above its least, or was no number; else all steps were taken

    @property
    def best(self) -> float:
        """The rate at which the smoothed loss was least."""
        return float(self.rates[self.smoothed.argmin()])

    @property
    def suggestion(self) -> float:
        """A tenth of `best`: there the loss still falls quickly, and far enough from where it rises."""
        return self.best / 10

    @property
    def warning(self) -> str:
        """What to do if the loss was least in the last tenth of the steps, without having risen since; else ""."""
        too_low = not self.diverged and self.smoothed.argmin() >= 0.9 * (len(self.smoothed) - 1)
        return "did not diverge: raise `high`" if too_low else ""


def find_learning_rate(
    model: keras.Model,
    data: Iterable,
    optimizer: keras.optimizers.Optimizer,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
) -> RangeTest:
    """Takes training steps at a learning rate that rises from `low` to `high`, then puts everything back.

    Weights, BatchNormalization statistics, random states and the optimizer's variables are afterwards what they were,
    bit for bit, also when a step fails. The rate rises by the same factor each step. The test stops when the
    smoothed loss exceeds four times its least value, or is no number. Source: Smith 2017.

    Args:
        model: compiled, since its loss is used: a `Trainer` of Stage 1 or of a verifier, or any model of Keras.
        data: batches (inputs, targets) as `fit` takes them, passed through as often as needed.
        optimizer: of the kind that will train, with a constant learning rate; it need not be the model's own.

    Raises:
        MSCNNError: a wrong range, a model that is not compiled, a schedule, no data, or a loss that is no number at
            the lowest rate.
    """
    if not 0 < low < high or steps < 2:
        raise MSCNNError(f"low {low:g}, high {high:g}, steps {steps}: they have to be 0 < low < high, and 2 or more.")
    if not model.compiled:
        raise MSCNNError(f"{model.name} is not compiled: call compile() first, for its loss is needed.")
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    before, losses = [variable.numpy() for variable in variables], []
    rates, step = np.geomspace(low, high, steps), _training_step(model, optimizer)
    try:
        for rate, (inputs, targets) in zip(rates, _endless(data), strict=False):
            _set_rate(optimizer, rate)
            losses.append(float(step(inputs, targets)))
            smoothed = smooth(losses)
            if not smoothed[-1] <= DIVERGED * smoothed.min():  # also if it is no number
                break
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
    return _range_test(rates, np.array(losses))


def _range_test(rates: np.ndarray, losses: np.ndarray) -> RangeTest:
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        raise MSCNNError("The loss is no number at the lowest learning rate: look for NaN in the data and the weights.")
    smoothed = smooth(finite)
    diverged = len(finite) < len(losses) or bool(smoothed[-1] > DIVERGED * smoothed.min())
    return RangeTest(rates[: len(finite)], finite, smoothed, diverged)


def _endless(data: Iterable) -> Iterator:
    """Pass after pass through the data."""
    while True:
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise MSCNNError("There are no batches in the data: give a tf.data.Dataset or a list of (inputs, targets).")


def _set_rate(optimizer: keras.optimizers.Optimizer, rate: float) -> None:
    try:
        optimizer.learning_rate = rate
    except (TypeError, AttributeError) as error:  # Keras' words for a schedule, and for a function
        raise MSCNNError("The optimizer has a schedule: give one with a constant rate, such as SGD(0.1).") from error


def _training_step(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> Callable:
    """A graph that takes one step on a batch and returns its loss before the step."""
    weights = model.trainable_variables

    @tf.function(reduce_retracing=True)
    def step(inputs, targets):
        with tf.GradientTape() as tape:
            predicted = model(inputs, training=True)
            loss = model.compute_loss(inputs, targets, predicted, training=True)
            scaled = optimizer.scale_loss(loss)  # float16 needs it
        optimizer.apply(tape.gradient(scaled, [weight.value for weight in weights]), weights)
        return loss

    return step


def smooth(losses: Iterable[float], keep: float = SMOOTHING) -> np.ndarray:
    """The running mean of losses (n,), without its bias towards its start at 0."""
    mean, means = 0.0, []
    for count, loss in enumerate(losses, start=1):
        mean = keep * mean + (1 - keep) * loss
        means.append(mean / (1 - keep**count))
    return np.array(means)


def plot_range_tests(tests: dict[str, RangeTest]) -> Figure:
    """The loss against the learning rate, a panel per test; a dotted line marks the suggestion."""
    figure, axes = new_axes(1, len(tests), 4.4)
    for axis, (title, test) in zip(axes, tests.items(), strict=True):
        axis.semilogx(test.rates, test.losses, color="C7", alpha=0.5, label="each step")
        axis.semilogx(test.rates, test.smoothed, color="C0", label="smoothed")
        axis.axvline(test.suggestion, color="C3", linestyle=":", label=f"suggestion {test.suggestion:.1e}")
        axis.set(xlabel="learning rate", ylabel="loss of the batch", title=f"{title}\n{test.warning}".strip())
        least, span = test.smoothed.min(), max(np.ptp(test.smoothed[: test.smoothed.argmin() + 1]), 0.05)
        axis.set_ylim(least - 0.5 * span, least + 2 * span)  # what diverges leaves the picture
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
    return figure


# ---- optimizers, schedules and callbacks


def optimizers(recipe: Recipe) -> dict[str, Callable[[Any], keras.optimizers.Optimizer]]:
    """Functions that make an optimizer from a learning rate or a schedule, from the simplest to our own."""
    kinds = keras.optimizers
    return {
        "SGD": kinds.SGD,
        "momentum": functools.partial(kinds.SGD, momentum=0.9),
        "Nesterov": functools.partial(kinds.SGD, momentum=0.9, nesterov=True),
        "Adagrad": kinds.Adagrad,
        "RMSprop": kinds.RMSprop,
        "Adam": kinds.Adam,
        "AdamW": functools.partial(kinds.AdamW, weight_decay=0.01),
        "Muon": lambda rate: Muon(rate, recipe.kernel_learning_rate / recipe.peak, recipe),
    }


@serializable
class CyclicRate(keras.optimizers.schedules.LearningRateSchedule):
    """Rises and falls in straight lines between two rates, in `period` steps, again and again. Source: Smith 2017."""

    def __init__(self, low: float, high: float, period: int):
        self.low, self.high, self.period = low, high, period

    def __call__(self, step):
        place = tf.cast(step, tf.float32) % self.period / self.period  # 0 to 1
        return self.low + (self.high - self.low) * (1 - tf.abs(2 * place - 1))

    def get_config(self):
        return {"low": self.low, "high": self.high, "period": self.period}


def schedules(peak: float, steps: int) -> dict[str, float | keras.optimizers.schedules.LearningRateSchedule]:
    """Learning rates of a training of so many steps that reach `peak`; lowering it on a plateau takes a callback."""
    kinds, rising = keras.optimizers.schedules, round(0.3 * steps)
    return {
        "constant": peak,
        "steps": kinds.PiecewiseConstantDecay([steps // 2, 4 * steps // 5], [peak, peak / 10, peak / 100]),
        "cosine": kinds.CosineDecay(peak, steps),
        "one-cycle": kinds.CosineDecay(
            peak / 25, steps - rising, alpha=1e-3, warmup_target=peak, warmup_steps=rising
        ),
        "cyclic": CyclicRate(peak / 10, peak, max(2, steps // 4)),
        "our triangle": WarmupLinearDecay(peak, round(0.23 * steps), steps),
    }  # fmt: skip


class LogLearningRate(keras.callbacks.Callback):
    """Writes the learning rate at the end of each epoch into the logs: `fit` shows it, the history keeps it."""

    def on_epoch_end(self, epoch, logs=None):
        logs["learning_rate"] = float(self.model.optimizer.learning_rate)


class CountedEarlyStopping(keras.callbacks.EarlyStopping):
    """Keras' early stopping, which prints each epoch how long it has been waiting."""

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        if self.monitor in (logs or {}) and epoch >= self.start_from_epoch:  # without the measure Keras warns
            waited = f"no improvement for {self.wait} of {self.patience} epochs" if self.wait else "best"
            print(f"epoch {epoch + 1}: {self.monitor} {logs[self.monitor]:.3f}, {waited}")


# ---- augmentation


class Sometimes(keras.layers.Layer):
    """Applies a layer to each image with a probability, and computes it for those images only.

    Keras' `RandomGaussianBlur` blurs the whole batch and then throws results away. In training only.

    Args:
        layer: float images (B, H, W, channels) -> the same shape. probability: of each image.
    """

    def __init__(self, layer: keras.layers.Layer, probability: float = 0.5, seed: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.layer, self.probability, self.random = layer, probability, keras.random.SeedGenerator(seed)

    def call(self, images, training=False):
        if not training:
            return images
        drawn = keras.random.uniform((tf.shape(images)[0],), dtype="float32", seed=self.random) < self.probability
        places = tf.where(drawn)  # (n, 1)
        return tf.tensor_scatter_nd_update(images, places, self.layer(tf.boolean_mask(images, drawn), training=True))


def augmentations(size: int, channels: int = 3, seed: int = 0) -> dict[str, keras.layers.Layer]:
    """Layers that augment batches of images (B, size, size, channels) of 0 to 255 while they train.

    All are Keras' own but "pad and crop": `keras.layers.RandomCrop` cuts all images of a batch at the same place.
    An older Keras lacks some of them: the function leaves them out and prints which.
    """
    scale = {"value_range": (0, 255)}
    # Keras multiplies the saturation by f / (1 - f): here by 0.8 to 1.2. From 0.2 alone it would make 0 to 0.25, gray.
    saturation = {"saturation_factor": (4 / 9, 6 / 11)} if channels == 3 else {}
    color = {"brightness_factor": 0.2, "contrast_factor": 0.2, **saturation, **scale}
    blur = {"factor": (1.0, 1.0), "kernel_size": 11, "sigma": (0.1, 2.0), **scale}
    square = {"factor": (1.0, 1.0), "scale": (1 / 16, 1 / 16), "fill_value": 128.0, **scale}
    wanted = {
        "flip": ("RandomFlip", {"mode": "horizontal"}),
        "shift 10 %": ("RandomTranslation", {"height_factor": 0.1, "width_factor": 0.1}),
        "rotation 10°": ("RandomRotation", {"factor": 10 / 360}),
        "color 0.2": ("RandomColorJitter", color),
        "blur": ("RandomGaussianBlur", blur),
        "blur, half": ("RandomGaussianBlur", blur),
        "mixup": ("MixUp", {"alpha": 0.2}),
        "cutout": ("RandomErasing", square),
    }
    kinds = {name: getattr(keras.layers, kind, None) for name, (kind, _) in wanted.items()}
    layers = {name: kind(**wanted[name][1], seed=seed) for name, kind in kinds.items() if kind}
    if missing := sorted({wanted[name][0] for name, kind in kinds.items() if not kind}):
        print(f"Keras {keras.__version__} lacks {', '.join(missing)}: left out. Keras 3.10 has them all.")
    if "blur, half" in layers:
        layers["blur, half"] = Sometimes(layers["blur, half"], 0.5, seed)
    return {"pad and crop": RandomFlipCrop(flip=False, shift=size // 8, seed=seed), **layers}


def augmented(layer: keras.layers.Layer, images: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """A batch as training sees it: float32 images (B, H, W, channels) and one-hot targets (B, C), mixed by MixUp."""
    images, targets = tf.cast(images, tf.float32), tf.cast(targets, tf.float32)
    if isinstance(layer, getattr(keras.layers, "MixUp", ())):
        mixed = layer({"images": images, "labels": targets}, training=True)
        return mixed["images"], mixed["labels"]
    seen = tf.clip_by_value(layer(images, training=True), 0, 255)  # color may leave the range
    return tf.ensure_shape(seen, images.shape), targets  # in a graph some layers lose it


# ---- the input pipeline and the machine


def input_pipelines(
    files: np.ndarray, labels: np.ndarray, decode: Callable, batch_size: int, workers: int | None = None
) -> dict[str, tf.data.Dataset]:
    """The same batches (images, labels), read in five ways: from encoded files or, the last, from memory.

    Args:
        files: the bytes of each image file, (N,). decode: bytes -> image (H, W, channels), in TensorFlow.
        workers: threads that decode; None: one per processor.
    """
    options = tf.data.Options()
    options.autotune.enabled = False  # so that each way is what its name says
    rows = tf.data.Dataset.from_tensor_slices((files, labels)).with_options(options)

    def read(file, label):
        return decode(file), label

    one = rows.map(read).batch(batch_size)
    several = rows.map(read, num_parallel_calls=workers or os.cpu_count()).batch(batch_size)
    images = tf.stack([decode(file) for file in files])  # (N, H, W, channels)
    resident = tf.data.Dataset.from_tensor_slices((images, labels)).with_options(options)
    return {
        "one worker": one, "several workers": several, "several workers, prefetch": several.prefetch(2),
        "cache": several.cache(), "resident": resident.batch(batch_size),
    }  # fmt: skip


def device_report() -> dict[str, str]:
    """What a training would run on: device, memory, threads, dtype policy, versions; for people, in words."""
    threads = tf.config.threading
    counts = threads.get_intra_op_parallelism_threads(), threads.get_inter_op_parallelism_threads()
    chosen = [str(count or f"{os.cpu_count()} (default)") for count in counts]
    return {
        "device": device_name(), **_memory(),
        "threads": f"{chosen[0]} within an operation, {chosen[1]} between them",
        "policy": keras.config.dtype_policy().name, **versions(),
    }  # fmt: skip


def _memory() -> dict[str, str]:
    """Memory of the GPU that TensorFlow uses, or of the machine and this process."""
    if tf.config.list_physical_devices("GPU"):
        used = tf.config.experimental.get_memory_info("GPU:0")  # bytes
        return {
            "memory": _gpu_total(), "in use": f"{used['current'] / 1e9:.2f} GB",
            "at most in use": f"{used['peak'] / 1e9:.2f} GB",
            "CUDA": str(tf.sysconfig.get_build_info().get("cuda_version", "unknown")),
        }  # fmt: skip
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        report = {"memory": f"{page * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"}
    except (AttributeError, ValueError, OSError):  # Windows
        return {"memory": "unknown"}
    statm = Path("/proc/self/statm")
    if statm.is_file():
        report["in use by this process"] = f"{page * int(statm.read_text().split()[1]) / 1e9:.2f} GB"
    return report


def _gpu_total() -> str:
    """Asks the driver, for TensorFlow does not tell it."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


# ---- ensembles


def mean_softmax(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Answers int64 (N,) and confidences (N,) of M networks by their mean probability, (M, N, C)."""
    mean = np.asarray(probability).mean(axis=0)  # (N, C)
    return mean.argmax(axis=1), mean.max(axis=1)


def majority_vote(probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Answers int64 (N,) and shares of the votes (N,) of M networks, (M, N, C); ties go to the mean probability."""
    probability = np.asarray(probability)
    votes = np.eye(probability.shape[2])[probability.argmax(axis=2)].mean(axis=0)  # (N, C)
    answers = (votes + 1e-6 * probability.mean(axis=0)).argmax(axis=1)
    return answers, votes[np.arange(len(answers)), answers]


# ---- the search


def open_study(path: str | Path, name: str, seed: int = 0, warm_up: int = 4) -> optuna.Study:
    """An Optuna study that minimizes, kept in an SQLite file: opened again, it goes on where it was.

    Args:
        name: all that the objective depends on besides its trial; trials of another name are another study's.
        seed: of the draws; a study that goes on draws others than at its start. warm_up: trials before one is pruned.

    Raises:
        MSCNNError: Optuna is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets it asks for them
            import optuna
    except ImportError as error:
        raise MSCNNError('Optuna is not installed: pip install ".[tuning]", then run this again.') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=name, storage=f"sqlite:///{Path(path).resolve()}", load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=warm_up),
    )  # fmt: skip
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), n_startup_trials=warm_up)
    return study


def run_trials(study: optuna.Study, objective: Callable[[optuna.Trial], float], trials: int) -> int:
    """Runs trials until `trials` are finished or pruned, earlier ones included; returns how many were run now."""
    done = sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)
    missing = max(0, trials - done)
    study.optimize(objective, n_trials=missing)
    return missing


class ReportToTrial(keras.callbacks.Callback):
    """Tells a trial a measure after each epoch, and ends the training if Optuna finds it hopeless.

    Args:
        trial: of Optuna. measure: the model that `fit` trains, as it is now -> what the study minimizes.
    """

    def __init__(self, trial: optuna.Trial, measure: Callable[[keras.Model], float]):
        super().__init__()
        self.trial, self.measure = trial, measure

    def on_epoch_end(self, epoch, logs=None):
        import optuna

        self.trial.report(self.measure(self.model), epoch)
        if self.trial.should_prune():
            raise optuna.TrialPruned
