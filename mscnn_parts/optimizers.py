"""The recipe of a training, and its optimizers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import keras
import tensorflow as tf

from mscnn_parts.checks import check_count, check_rate, check_share
from mscnn_parts.settings import MSCNNError, check_stage1
from mscnn_parts.zoo import network_named

OPTIMIZERS = ("muon", "sgd", "adam")


@dataclass(frozen=True)
class Phase:
    """A part of a training: which groups of layers it frees beside the last dense layer, for how long, how fast.

    Raises:
        MSCNNError: no epochs, or no learning rate.
    """

    groups: tuple[int, ...]  # of `zoo.Network.groups`; (): the dense layer alone, on features that are computed once
    epochs: int
    learning_rate: float  # peak

    def __post_init__(self):
        check_count("epochs of a phase", self.epochs)
        check_rate("learning_rate of a phase", self.learning_rate)


def staged(groups: int, epochs: int) -> tuple[Phase, ...]:
    """The dense layer, then all groups but the first three, which see edges and colors.

    Args:
        groups: how many there are. epochs: of the second phase.
    """
    return Phase((), 20, 1e-3), Phase(tuple(range(min(3, groups // 2), groups)), epochs, 5e-4)


@dataclass(frozen=True)
class Recipe:
    """How the CNNs are trained; `default_recipe` chooses epochs and batch size for the data at hand.

    Raises:
        MSCNNError: a value with which nothing can be trained.
    """

    epochs: int
    batch_size: int
    stage2_base_epochs: int = 0  # 0: as many as Stage 1
    learning_rate: float = 0.5  # peak, at batches of 512; proportional to the batch size
    kernel_learning_rate: float = 0.06  # the same of convolution kernels, at any batch size; see Muon
    momentum: float = 0.85
    weight_decay: float = 0.009  # a step takes away learning rate x weight decay of each weight but the kernels
    label_smoothing: float = 0.2
    warm_up: float = 0.23  # share of the steps in which the learning rate rises
    small_crops: float = 0.5  # share of the epochs, the first ones, that see a part of each image; see ProgressiveCrops
    stage2_learning_rate: float = 0.02  # at first, at batches of 256; proportional to the batch size
    stage2_kernel_learning_rate: float = 0.01  # at first, at any batch size
    stage2_fraction: float = 0.07  # images drawn for a category in an epoch, as a share of the train split
    views: int = 3  # augmented views of each train image whose features are computed, for what sees features
    optimizer: str = "muon"  # of Stage 1, one of OPTIMIZERS; the others are for networks that Muon was not tried on
    optimizer_rate: float = 0.05  # peak learning rate of sgd or adam
    optimizer_decay: float = 5e-4  # weight decay of sgd or adam
    phases: tuple[Phase, ...] = ()  # staged unfreezing, of networks with ImageNet weights

    def __post_init__(self):
        for name in ("epochs", "batch_size", "views"):
            check_count(name, getattr(self, name))
        check_count("stage2_base_epochs", self.stage2_base_epochs, least=0)
        for name in (field.name for field in dataclasses.fields(self) if field.name.endswith(("_rate", "_fraction"))):
            check_rate(name, getattr(self, name))
        for name in ("weight_decay", "optimizer_decay"):
            check_rate(name, getattr(self, name), zero=True)
        for name in ("momentum", "label_smoothing"):
            check_share(name, getattr(self, name), one=False)
        for name in ("warm_up", "small_crops"):
            check_share(name, getattr(self, name))
        if self.optimizer not in OPTIMIZERS:
            raise MSCNNError(f"optimizer is {self.optimizer!r}: choose among {', '.join(OPTIMIZERS)}.")

    @property
    def peak(self) -> float:
        """The highest learning rate of Stage 1 and the Stage 2 base network, kernels aside."""
        return self.learning_rate * self.batch_size / 512


def phase_recipes(recipe: Recipe) -> list[Recipe]:
    """The recipes of the trainings of Stage 1 that follow each other: one for each phase, or the recipe itself."""
    return [
        dataclasses.replace(recipe, epochs=phase.epochs, optimizer_rate=phase.learning_rate, phases=(), small_crops=0.0)
        for phase in recipe.phases
    ] or [recipe]


def default_recipe(images: int, epochs: int = 0, batch_size: int = 0, network: str = "compact") -> Recipe:
    """The recipe for a number of train images; epochs or batch size 0 leave the choice to it.

    With few images an epoch is few steps. So the steps are larger there, all epochs see whole images, and Stage 2 and
    its base network, which are cheap, see more of them. With many, a base network of some points more did not make
    better verifiers, so it has fewer epochs than Stage 1.

    Args:
        network: a name of `NETWORKS`, or "own" for a network of one's own.

    Raises:
        MSCNNError: an unknown network, or a number that is none.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        check_count(name, value, least=0)
    if network != "own":
        check_stage1(network)
    entry = network_named(network)
    changes = {"small_crops": 0.0, **entry.recipe}
    if entry.pretrained:
        epochs, batch_size = epochs or 9, batch_size or 32
        changes |= {"stage2_base_epochs": 30, "phases": staged(len(entry.groups), epochs)}
    if entry.recipe:
        batch_size = batch_size or (128 if images >= 20_000 else 64)
        return dataclasses.replace(default_recipe(images, epochs, batch_size), **changes)
    epochs = epochs or 20
    if images < 20_000:
        return Recipe(
            epochs,
            batch_size or 64,
            stage2_base_epochs=2 * epochs,
            learning_rate=0.75,
            small_crops=0.0,
            stage2_fraction=0.3,
        )
    return Recipe(epochs, batch_size or 512, stage2_base_epochs=max(1, round(0.8 * epochs)))


class WarmupLinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rises in a straight line from a fifth to the peak, then falls in another to a hundredth (airbench: to 7 %)."""

    def __init__(self, peak: float, rising: int, steps: int):
        self.peak, self.rising, self.steps = peak, rising, steps

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        rise = 0.2 + 0.8 * step / max(self.rising, 1)
        fall = 0.01 + 0.99 * (self.steps - step) / max(self.steps - self.rising, 1)
        return self.peak * tf.maximum(tf.minimum(rise, fall), 0.01)

    def get_config(self):  # TensorBoard asks for it
        return {"peak": self.peak, "rising": self.rising, "steps": self.steps}


def learning_rate_schedule(recipe: Recipe, steps: int) -> WarmupLinearDecay:
    """Of Stage 1 and the Stage 2 base network, for a training of so many steps."""
    peak = recipe.peak if recipe.optimizer == "muon" else recipe.optimizer_rate
    return WarmupLinearDecay(peak, int(recipe.warm_up * steps), steps)


class Muon(keras.optimizers.SGD):
    """SGD with Nesterov momentum that orthogonalises the steps of convolution kernels.

    A kernel is seen as a matrix with a column for each output channel, and so is its step. A plain step is ruled by the
    few directions with the largest gradients; here all its singular values are made nearly equal, so that it moves as
    far in the others. Kernels are kept at one length, since BatchNormalization makes their scale idle: so their
    learning rate is a share of it, and they need no weight decay. Every other weight takes a plain step.
    Source: Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024; airbench94_muon.

    Args:
        schedule: learning rate of the other weights.
        kernel_gain: the kernels' learning rate is so many times that of the others.
        recipe: its momentum and weight decay are used.
    """

    def __init__(self, schedule: keras.optimizers.schedules.LearningRateSchedule, kernel_gain: float, recipe: Recipe):
        super().__init__(schedule, recipe.momentum, nesterov=True, weight_decay=recipe.weight_decay)
        self.kernel_gain = kernel_gain

    def build(self, variables):
        self.exclude_from_weight_decay([variable for variable in variables if len(variable.shape) == 4])
        super().build(variables)

    def update_step(self, gradient, variable, learning_rate):
        if len(variable.shape) != 4:
            return super().update_step(gradient, variable, learning_rate)
        momentum = self.momentums[self._get_variable_index(variable)]
        self.assign(momentum, self.momentum * momentum + gradient)
        step = orthogonalize(kernel_matrix(gradient + self.momentum * momentum))  # (9 in, out)
        kernel = variable * (variable.shape[-1] ** 0.5 / tf.norm(variable))
        rate = tf.cast(learning_rate, kernel.dtype) * self.kernel_gain
        self.assign(variable, kernel - rate * tf.reshape(step, variable.shape))


def kernel_matrix(kernel: tf.Tensor) -> tf.Tensor:
    """A convolution kernel (height, width, in, out) as a matrix (height width in, out)."""
    return tf.reshape(kernel, (-1, kernel.shape[-1]))


def orthogonalize(matrix: tf.Tensor, rounds: int = 3) -> tf.Tensor:
    """About the nearest matrix whose singular values are all 1: float32 (m, n) -> (m, n).

    By Newton-Schulz iteration with coefficients chosen for speed: in three rounds, singular values of more than a
    fiftieth of the matrix' length end between 0.7 and 1.2 or so, which is near enough for a step. All rounds are done
    on the matrix of inner products, which is smaller, and applied at once. Source: Jordan 2024.
    """
    x = matrix / (tf.norm(matrix) + 1e-7)
    inner = tf.matmul(x, x, transpose_a=True)  # (n, n)
    transform = identity = tf.eye(inner.shape[0])
    for _ in range(rounds):
        polynomial = 3.4445 * identity - 4.7750 * inner + 2.0315 * inner @ inner
        transform = transform @ polynomial
        inner = polynomial @ inner @ polynomial
    return x @ transform


def stage1_optimizer(recipe: Recipe, steps: int) -> keras.optimizers.Optimizer:
    """The optimizer of Stage 1 and the Stage 2 base network, for a training of so many steps."""
    if recipe.optimizer != "muon":
        schedule = learning_rate_schedule(recipe, steps)
        if recipe.optimizer == "sgd":
            return keras.optimizers.SGD(schedule, 0.9, nesterov=True, weight_decay=recipe.optimizer_decay)
        return keras.optimizers.AdamW(schedule, recipe.optimizer_decay)
    return Muon(learning_rate_schedule(recipe, steps), recipe.kernel_learning_rate / recipe.peak, recipe)


def stage2_optimizer(recipe: Recipe, batch_size: int, steps: int, heads: bool = False) -> keras.optimizers.Optimizer:
    """The optimizer of a Stage 2 network, whose learning rate falls from the first step on.

    Args:
        heads: the networks are heads on Stage 1's features.
    """
    if heads:
        return keras.optimizers.AdamW(keras.optimizers.schedules.CosineDecay(5e-4, steps, alpha=0.01), 1e-3)
    rate = recipe.stage2_learning_rate * batch_size / 256
    falling = keras.optimizers.schedules.CosineDecay(rate, steps, alpha=0.01)
    return Muon(falling, recipe.stage2_kernel_learning_rate / rate, recipe)
