"""Measures what each ablation of the training recipe is worth, and writes ablations.json and RESULTS.md.

    python benchmarks/ablations.py                 three seeds each: three quarters of an hour on two cores
    python benchmarks/ablations.py --regularizers  only what is said to rank right above wrong: a quarter of an hour
    python benchmarks/ablations.py --quick         one seed, little training: minutes; shows that it works

The network is that of Stage 2, which has all the layers of Stage 1 at a seventh of its multiply-adds. It is trained by
the recipe for full data, scaled down: on 10,000 of CIFAR-10's train images, in 12 epochs and batches of 128. 20,000
others of the train split test it: nothing here sees the test split. Each variant leaves one ablation out, or adds one
that the recipe does without, and is compared with the recipe seed by seed. The regularizers have a table of their own,
with the recipe as it was when they were measured.
"""

import argparse
import dataclasses
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from common import in_fresh_process, markdown, origin, origin_line, read_json, spread, write

import mscnn_helpers as mscnn
from mscnn_parts.layers import RANDOM_FLIP, FusedBatchNormalization, RandomFlipCrop

BATCH = 128  # so that 10,000 images are enough steps


@dataclasses.dataclass
class Training:
    """What a variant may change before the training begins."""

    network: object  # keras.Model
    recipe: object  # mscnn.Recipe
    steps: int
    callbacks: list
    trainer_class: type = mscnn.Trainer
    optimizer: keras.optimizers.Optimizer | None = None  # in place of the recipe's

    def run(self, data: mscnn.Dataset, seed: int = 0) -> None:
        more = {"callbacks": self.callbacks, "trainer_class": self.trainer_class, "optimizer": self.optimizer}
        mscnn.train_classifier(self.network, data, self.recipe, seed, **more)


# ---- the variants: each changes a Training


def recipe_as_it_is(training: Training) -> None:
    """Changes nothing."""


def without_whitening(training: Training) -> None:
    """A random fixed kernel of the same length."""
    kernel = training.network.get_layer("whitening").kernel
    random = np.random.default_rng(0).normal(size=kernel.shape)
    kernel.assign(random * np.linalg.norm(kernel) / np.linalg.norm(random))


def with_identity(training: Training) -> None:
    """The first filters of a convolution pass their input on unchanged: 'dirac' initialisation (Jordan 2024, 3.3)."""
    for layer in training.network.layers:
        if isinstance(layer, keras.layers.Conv2D):
            kernel = layer.kernel.numpy()  # (3, 3, in, out)
            passed = range(min(kernel.shape[2:]))
            kernel[:, :, :, passed] = 0
            kernel[1, 1, passed, passed] = 1
            layer.kernel.assign(kernel)


def normalizations(network) -> list:
    return [layer for layer in network.layers if isinstance(layer, FusedBatchNormalization)]


def without_fast_statistics(training: Training) -> None:
    """BatchNormalization's momentum as Keras has it."""
    for layer in normalizations(training.network):
        layer.momentum = 0.99


def without_fast_offsets(training: Training) -> None:
    """BatchNormalization's offsets learn at the learning rate of all."""
    for layer in normalizations(training.network):
        layer.OFFSET_GAIN = 1.0


def without_logit_scale(training: Training) -> None:
    training.network.get_layer("scaled").scale = 1.0


def with_silu(training: Training) -> None:
    """SiLU in place of ReLU."""
    for layer in training.network.layers:
        if isinstance(layer, keras.layers.Activation):
            layer.activation = keras.activations.silu


def without_small_crops(training: Training) -> None:
    training.recipe = dataclasses.replace(training.recipe, small_crops=0.0)


def without_small_crops_at_equal_work(training: Training) -> None:
    """Whole images, in as many epochs as the small crops leave time for."""
    training.recipe = dataclasses.replace(training.recipe, small_crops=0.0, epochs=9)


def without_label_smoothing(training: Training) -> None:
    training.recipe = dataclasses.replace(training.recipe, label_smoothing=0.0)


def with_less_label_smoothing(training: Training) -> None:
    training.recipe = dataclasses.replace(training.recipe, label_smoothing=0.1)


class RandomFlip(keras.callbacks.Callback):
    """Leaves it to chance whether an image is mirrored, after the module has told the epoch."""

    def __init__(self, augmentation: RandomFlipCrop):
        super().__init__()
        self.augmentation = augmentation

    def on_epoch_begin(self, epoch, logs=None):
        self.augmentation.epoch.assign(RANDOM_FLIP)


def without_alternating_flip(training: Training) -> None:
    """Each image is mirrored at random."""
    training.callbacks.append(RandomFlip(training.network.get_layer("augmentation")))


def without_muon(training: Training) -> None:
    """Plain steps for the kernels, too."""

    recipe, schedule = training.recipe, mscnn.learning_rate_schedule(training.recipe, training.steps)
    training.optimizer = keras.optimizers.SGD(
        schedule, recipe.momentum, nesterov=True, weight_decay=recipe.weight_decay
    )


def without_schedule(training: Training) -> None:
    """A constant learning rate, a fifth of the peak."""
    recipe = training.recipe
    training.optimizer = mscnn.Muon(0.2 * recipe.peak, recipe.kernel_learning_rate / recipe.peak, recipe)


def without_augmentation(training: Training) -> None:
    layer = training.network.get_layer("augmentation")
    layer.flip, layer.shift = False, 0


def with_stronger_shift(training: Training) -> None:
    training.network.get_layer("augmentation").shift = 4


def with_lookahead(training: Training) -> None:
    """A slow copy of the weights, to which the weights return every five steps (Jordan 2024, 3.4)."""

    class Lookahead(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.step, self.slow = 0, [weight.numpy() for weight in self.model.weights]

        def go_back(self, keep):
            """Moves the slow weights towards the fast ones, and the fast ones onto them."""
            for slow, weight in zip(self.slow, self.model.weights, strict=True):
                if slow.dtype == np.float32:
                    slow += (1 - keep) * (weight.numpy() - slow)
                    weight.assign(slow)

        def on_train_batch_end(self, batch, logs=None):
            self.step += 1
            if self.step == training.steps:  # before the validation of the last epoch
                self.go_back(1.0)
            elif self.step % 5 == 0:
                self.go_back(0.95**5 * (self.step / training.steps) ** 3)

    training.callbacks.append(Lookahead())


def with_averaged_weights(training: Training) -> None:
    """The mean of the weights over the last quarter of the steps (Izmailov et al. 2018, at a falling rate)."""

    class Averaged(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.step, self.times = 0, 0
            self.weights = [weight for weight in self.model.weights if weight.dtype == "float32"]
            self.means = [np.zeros(weight.shape) for weight in self.weights]

        def on_train_batch_end(self, batch, logs=None):
            self.step += 1
            last = self.step == training.steps  # before the validation of the last epoch
            if self.step < 0.75 * training.steps or (self.step % 5 and not last):
                return
            self.times += 1
            for mean, weight in zip(self.means, self.weights, strict=True):
                mean += (weight.numpy() - mean) / self.times
                if last:
                    weight.assign(mean)

    training.callbacks.append(Averaged())


def with_sharpness_aware_steps(training: Training) -> None:
    """Each step by the gradient at a near point uphill, at twice the multiply-adds (SAM, Foret et al. 2021)."""

    class SharpnessAware(mscnn.Trainer):
        def train_step(self, data):
            images, labels = data
            weights = self.trainable_variables
            gradients, *_ = self.gradients(images, labels)
            length = tf.linalg.global_norm(gradients) + 1e-12
            uphill = [0.05 * one / length for one in gradients]
            for weight, by in zip(weights, uphill, strict=True):
                weight.assign(weight + by)
            gradients, predicted, loss = self.gradients(images, labels)
            for weight, by in zip(weights, uphill, strict=True):
                weight.assign(weight - by)
            self.optimizer.apply(gradients, weights)
            self._loss_tracker.update_state(loss)
            return self.compute_metrics(images, labels, predicted)

        def gradients(self, images, labels):
            with tf.GradientTape() as tape:
                predicted = self(images, training=True)
                loss = self.compute_loss(images, labels, predicted)
            return tape.gradient(loss, [one.value for one in self.trainable_variables]), predicted, loss

    training.trainer_class = SharpnessAware


def mixed(training: Training, mix: Callable) -> None:
    """Training sees mixtures of each image with another of the batch; the loss is mixed likewise.

    Args:
        mix: augmented images (B, H, W, channels) and the same in reverse order -> mixtures, and the share of the first.
    """

    class Mixing(mscnn.Trainer):
        def call(self, inputs, training=False):
            if not training:
                return super().call(inputs)
            _, augmentation, *rest = self.network.layers
            images = augmentation(tf.gather(self.images, inputs), training=True)
            outputs, self.share = mix(images, tf.reverse(images, [0]))
            for layer in rest:
                outputs = layer(outputs, training=True)
            return outputs

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            if training:
                y = tf.cast(y, tf.float32)  # (B, C)
                y = self.share * y + (1 - self.share) * tf.reverse(y, [0])
            return super().compute_loss(x, y, y_pred, sample_weight, training)

    training.trainer_class = Mixing


def with_mixup(training: Training) -> None:
    """Weighted means of two images, the weight from Beta(0.2, 0.2) (Zhang et al. 2018)."""

    def mix(images, others):
        one, two = tf.unstack(tf.random.gamma((2,), 0.2) + 1e-6)
        share = tf.maximum(one, two) / (one + two)
        return share * images + (1 - share) * others, share

    mixed(training, mix)


def square_in(size, side):
    """Where a random square of so many pixels a side lies: bool (size, size)."""
    places = tf.range(size)
    row, column = (tf.random.uniform((), 0, size - side + 1, tf.int32) for _ in range(2))
    inside = [(places >= one) & (places < one + side) for one in (row, column)]
    return inside[0][:, None] & inside[1]


def with_cutmix(training: Training) -> None:
    """In every second batch a square of up to half of each image comes from another image (Yun et al. 2019)."""

    def mix(images, others):
        size = tf.shape(images)[1]
        whole = tf.cast(size, tf.float32)
        taken = tf.random.uniform(()) * tf.cast(tf.random.uniform(()) < 0.5, tf.float32) / 2
        side = tf.cast(tf.round(tf.sqrt(taken) * whole), tf.int32)
        share = 1 - (tf.cast(side, tf.float32) / whole) ** 2
        return tf.where(square_in(size, side)[..., None], others, images), share

    mixed(training, mix)


def with_cutout(training: Training) -> None:
    """A random square of 8 pixels a side, the same for a batch, is gray (DeVries & Taylor 2017)."""

    def mix(images, _):
        return tf.where(square_in(tf.shape(images)[1], 8)[..., None], 128.0, images), 1.0

    mixed(training, mix)


VARIANTS: dict[str, Callable[[Training], None]] = {
    "the recipe": recipe_as_it_is,
    "without the whitening kernel": without_whitening,
    "without fast BatchNormalization statistics": without_fast_statistics,
    "without fast BatchNormalization offsets": without_fast_offsets,
    "without the factor before the dense layer": without_logit_scale,
    "without small crops": without_small_crops,
    "without small crops, 9 epochs": without_small_crops_at_equal_work,
    "without label smoothing": without_label_smoothing,
    "with label smoothing 0.1": with_less_label_smoothing,
    "without alternating flip": without_alternating_flip,
    "without Muon": without_muon,
    "without a rising and falling learning rate": without_schedule,
    "without augmentation": without_augmentation,
    "with shifts of up to 4 pixels": with_stronger_shift,
    "with identity initialisation": with_identity,
    "with SiLU": with_silu,
    "with lookahead": with_lookahead,
}
REGULARIZERS: dict[str, Callable[[Training], None]] = {
    "the recipe": recipe_as_it_is,
    "with averaged weights": with_averaged_weights,
    "with sharpness-aware steps, at twice the multiply-adds": with_sharpness_aware_steps,
    "with mixup": with_mixup,
    "with CutMix": with_cutmix,
    "with Cutout": with_cutout,
}


# ---- measuring


def train(variant: str, seed: int, policy: str, quick: bool) -> dict[str, float]:
    """Trains a Stage 2 base network by the recipe but for the variant, and measures it on unseen train images.

    Returns:
        accuracy, and aurc of its softmax.
    """
    data = mscnn.load_dataset("cifar10", seed=seed)
    images, epochs, measured = (1000, 2, 1000) if quick else (10_000, 12, 20_000)
    order = np.random.default_rng(seed).permutation(len(data.train))
    unseen = data.train.take(order[images : images + measured])
    data = dataclasses.replace(data, train=data.train.take(order[:images]))
    model = mscnn.MultiStageCNN.for_dataset(data, policy, seed)
    recipe = mscnn.Recipe(epochs, BATCH)
    training = Training(model.stage2_base, recipe, -(-images // BATCH) * epochs, [])
    (VARIANTS | REGULARIZERS)[variant](training)
    training.run(data, seed)
    logits = np.concatenate([training.network.predict_on_batch(part) for part in np.array_split(unseen.images, 20)])
    predicted = logits.argmax(axis=1)
    correct = predicted == unseen.labels
    aurc = mscnn.aurc(mscnn.log_odds(logits, predicted), correct)
    return {"accuracy": float(correct.mean()), "aurc": aurc}


# ---- RESULTS.md


def rows_of(runs_of: dict[str, list[dict]]) -> list[str]:
    """The lines of a table: each variant against the recipe, seed by seed."""
    base, rows = runs_of["the recipe"], []
    for name, runs in runs_of.items():
        pairs = list(zip(runs, base, strict=True))
        rows.append([
            name, spread([one["accuracy"] for one in runs], "{:.2%}"),
            spread([100 * (one["accuracy"] - other["accuracy"]) for one, other in pairs], "{:+.2f}"),
            spread([one["aurc"] for one in runs], "{:.4f}"),
            spread([one["aurc"] / other["aurc"] - 1 for one, other in pairs], "{:+.1%}"),
        ])  # fmt: skip
    return markdown(["training", "accuracy", "against the recipe, points", "AURC", "against the recipe"], rows)


def table(results: dict) -> str:
    """Its section of RESULTS.md."""
    lines = [
        "## Ingredients", "",
        "Written by `python benchmarks/ablations.py`. The Stage 2 base network, trained by the recipe for full data,",
        "scaled down to 10,000 of CIFAR-10's train images, and tested on 20,000 others (see the script's first lines):",
        "what Stage 1 would gain or lose on all images can differ. A lower AURC is better. Median over",
        "the seeds, in brackets minimum and maximum; differences are taken seed by seed. No variant is tuned anew, so",
        "a difference says what the recipe loses without an ablation, not what the best recipe without it would.", "",
        *rows_of(results["variants"]),
        "What is better here and not in the recipe: whole images and SiLU take longer; at equal multiply-adds the",
        "former keep little of their gain. Without label smoothing, or with less, the ranking is better here; on all",
        "data, and by the margin in place of the softmax, that is not settled.", "",
        origin_line(results),
    ]  # fmt: skip
    if regularizers := results.get("regularizers"):
        lines += [
            "", "What is said to help in ranking correct answers above incorrect ones, in the same trial:", "",
            *rows_of(regularizers["variants"]), origin_line(regularizers),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def measure(variants: dict[str, Callable], command: str, quick: bool) -> dict:
    """All variants, in turn for each seed."""
    results = {**origin(command), "variants": {name: [] for name in variants}}
    policy = mscnn.fastest_policy()  # one for all
    for seed in (0,) if quick else (0, 1, 2):
        for name, runs in results["variants"].items():
            runs.append(in_fresh_process(train, name, seed, policy, quick))  # it may change the module
            print(f"seed {seed}, {name}: {runs[-1]['accuracy']:.2%}", flush=True)
    return results


def main() -> None:
    """Measures, and writes ablations.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, little training; replaces no full figures")
    parser.add_argument("--regularizers", action="store_true", help="only these, beside the recipe")
    options = parser.parse_args()
    quick, known = " --quick" * options.quick, read_json("ablations", {})
    if options.regularizers and not known:
        parser.error("there is no ablations.json to add them to: leave out --regularizers")
    results = known
    if not options.regularizers:
        results = measure(VARIANTS, f"python benchmarks/ablations.py{quick}", options.quick)
    if options.regularizers or "regularizers" not in known:
        own = measure(REGULARIZERS, f"python benchmarks/ablations.py --regularizers{quick}", options.quick)
        results = {**results, "regularizers": own}
    print(table(results))
    if not options.quick or not known:
        write("ablations", results, table(results))


if __name__ == "__main__":
    main()
