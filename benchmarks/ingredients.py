"""Measures what each ingredient of the training recipe is worth, and writes ingredients.json and RESULTS.md.

    python benchmarks/ingredients.py              three seeds each: three quarters of an hour on two cores
    python benchmarks/ingredients.py --quick      one seed, little training: minutes; shows that it works

The network is the companion's, which has all the layers of Stage 1 at a seventh of its work. It is trained by the
recipe for full data, scaled down: on 10,000 of CIFAR-10's train images, in 12 epochs and batches of 128. 20,000 others
of the train split judge it: nothing here sees the test split. Each variant leaves one ingredient out, or adds one that
the recipe does without, and is compared with the recipe seed by seed.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable

import numpy as np
from common import ROOT, in_fresh_process, markdown, origin, origin_line, read_json, spread, write

BATCH = 128  # so that 10,000 images are enough steps


@dataclasses.dataclass
class Training:
    """What a variant may change before the training begins."""

    network: object  # keras.Model
    recipe: object  # mscnn.Recipe
    steps: int
    callbacks: list


# ---- the variants: each changes a Training, or the module in its own process


def recipe_as_it_is(training: Training) -> None:
    """Changes nothing."""


def without_whitening(training: Training) -> None:
    """A random fixed kernel of the same length."""
    kernel = training.network.get_layer("whitening").kernel
    random = np.random.default_rng(0).normal(size=kernel.shape)
    kernel.assign(random * np.linalg.norm(kernel) / np.linalg.norm(random))


def with_identity(training: Training) -> None:
    """The first filters of a convolution pass their input on unchanged: 'dirac' initialisation (Jordan 2024, 3.3)."""
    import keras

    for layer in training.network.layers:
        if isinstance(layer, keras.layers.Conv2D):
            kernel = layer.kernel.numpy()  # (3, 3, in, out)
            passed = range(min(kernel.shape[2:]))
            kernel[:, :, :, passed] = 0
            kernel[1, 1, passed, passed] = 1
            layer.kernel.assign(kernel)


def normalizations(network) -> list:
    import mscnn_helpers as mscnn

    return [layer for layer in network.layers if isinstance(layer, mscnn.FusedBatchNormalization)]


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
    import keras

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


def without_alternating_flip(training: Training) -> None:
    """Each image is mirrored at random."""
    import keras

    import mscnn_helpers as mscnn

    mscnn.AlternatingFlip = lambda augmentation: keras.callbacks.Callback()


def without_muon(training: Training) -> None:
    """Plain steps for the kernels, too."""
    import keras

    import mscnn_helpers as mscnn

    def sgd(recipe, steps):
        schedule = mscnn.learning_rate_schedule(recipe, steps)
        return keras.optimizers.SGD(schedule, recipe.momentum, nesterov=True, weight_decay=recipe.weight_decay)

    mscnn.muon_for = sgd


def without_schedule(training: Training) -> None:
    """A constant learning rate, a fifth of the peak."""
    import mscnn_helpers as mscnn

    mscnn.learning_rate_schedule = lambda recipe, steps: 0.2 * recipe.peak


def without_augmentation(training: Training) -> None:
    layer = training.network.get_layer("augmentation")
    layer.flip, layer.shift = False, 0


def with_stronger_shift(training: Training) -> None:
    training.network.get_layer("augmentation").shift = 4


def with_lookahead(training: Training) -> None:
    """A slow copy of the weights, to which the weights return every five steps (Jordan 2024, 3.4)."""
    import keras

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


# ---- measuring


def train(variant: str, seed: int, policy: str, quick: bool) -> dict[str, float]:
    """Trains a companion by the recipe but for the variant, and judges it on train images it has not seen.

    Returns:
        accuracy, and aurc of its softmax.
    """
    import mscnn_helpers as mscnn

    data = mscnn.load_dataset("cifar10", seed=seed)
    images, epochs, judges = (1000, 2, 1000) if quick else (10_000, 12, 20_000)
    order = np.random.default_rng(seed).permutation(len(data.train))
    unseen = data.train.take(order[images : images + judges])
    data = dataclasses.replace(data, train=data.train.take(order[:images]))
    model = mscnn.MultiStageCNN.for_dataset(data, policy, seed)
    recipe = mscnn.Recipe(epochs, BATCH)
    training = Training(model.companion, recipe, -(-images // BATCH) * epochs, [])
    VARIANTS[variant](training)
    mscnn.train_classifier(training.network, data, training.recipe, seed, callbacks=training.callbacks)
    logits = np.concatenate([training.network.predict_on_batch(part) for part in np.array_split(unseen.images, 20)])
    predicted = logits.argmax(axis=1)
    right = predicted == unseen.labels
    aurc = mscnn.aurc(mscnn.log_odds(logits, predicted), right)
    return {"accuracy": float(right.mean()), "aurc": aurc}


# ---- RESULTS.md


def table(found: dict) -> str:
    """Its section of RESULTS.md: each variant against the recipe, seed by seed."""
    base, rows = found["variants"]["the recipe"], []
    for name, runs in found["variants"].items():
        pairs = list(zip(runs, base, strict=True))
        rows.append([
            name, spread([one["accuracy"] for one in runs], "{:.2%}"),
            spread([100 * (one["accuracy"] - other["accuracy"]) for one, other in pairs], "{:+.2f}"),
            spread([one["aurc"] for one in runs], "{:.4f}"),
            spread([one["aurc"] / other["aurc"] - 1 for one, other in pairs], "{:+.1%}"),
        ])  # fmt: skip
    header = ["training", "accuracy", "against the recipe, points", "AURC", "against the recipe"]
    lines = [
        "## Ingredients", "",
        "Written by `python benchmarks/ingredients.py`. The companion's network, trained by the recipe for full data,",
        "scaled down to 10,000 of CIFAR-10's train images, and judged by 20,000 others (see the script's first lines):",
        "what Stage 1 would gain or lose on all images can differ. A lower AURC is better. Median over",
        "the seeds, in brackets minimum and maximum; differences are taken seed by seed. No variant is tuned anew, so",
        "a difference says what the recipe loses without an ingredient, not what the best recipe without it would.", "",
        *markdown(header, rows),
        origin_line(found),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures all variants, in turn for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, little training; replaces no full figures")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import mscnn_helpers as mscnn

    command = "python benchmarks/ingredients.py" + " --quick" * options.quick
    found = origin(command)
    found["variants"], policy = {name: [] for name in VARIANTS}, mscnn.fastest_policy()  # one for all
    for seed in (0,) if options.quick else (0, 1, 2):
        for name, runs in found["variants"].items():
            runs.append(in_fresh_process(train, name, seed, policy, options.quick))  # it may change the module
            print(f"seed {seed}, {name}: {runs[-1]['accuracy']:.2%}", flush=True)
    print(table(found))
    known = read_json("ingredients", found)
    if not options.quick or known["command"] == command:
        write("ingredients", found, table(found))


if __name__ == "__main__":
    main()
