"""Measures whether ten specialised judges are worth it, against one for all, and writes judges.json and RESULTS.md.

    python benchmarks/judges.py           seeds 0, 1, 2, after quality.py and selective.py: a quarter of an hour
    python benchmarks/judges.py --quick   seed 0 in light mode, after selective.py --quick: a minute

All give a second opinion on the answers of the same frozen Stage 1, which is combined with its margin as the model does
it, and calibrated on the same split. All begin with the same companion, and are trained on as many further images:

    ours                   ten Stage 2 CNNs, each on its own category and its hard negatives
    one shared verifier    one CNN on all ten draws, mixed: each image with the category that is asked for
    companion, longer      one CNN on all categories as Stage 1 learns them, in so many more epochs
    companion              as it is
"""

import argparse
import dataclasses
import sys
from typing import NamedTuple

import numpy as np
import selective
from common import ROOT, in_fresh_process, markdown, numbers, origin, origin_line, spread, write


class Draw(NamedTuple):
    """What the ten Stage 2 CNNs are trained on, for one CNN to be trained on."""

    indices: np.ndarray  # int64 (N,), of the train images
    asked: np.ndarray  # float32 (N, C): 1 where it is asked whether the image shows that category
    right: np.ndarray  # float32 (N,): whether it does


def mixed_draw(labels: np.ndarray, probability: np.ndarray, count: int, rng: np.random.Generator) -> Draw:
    """The draws of all categories, `count` images each, in random order.

    Args:
        labels: (M,). probability: Stage 1's, (M, C).
    """
    import mscnn_helpers as mscnn

    categories = probability.shape[1]
    drawn = [mscnn.draw_stage2_images(labels, probability[:, c], c, count, rng) for c in range(categories)]
    indices, category = np.concatenate(drawn), np.repeat(np.arange(categories), count)
    order = rng.permutation(len(indices))
    indices, category = indices[order], category[order]
    return Draw(indices, np.eye(categories, dtype=np.float32)[category], np.float32(labels[indices] == category))


def asked_log_odds(logits, asked):
    """Log-odds of the category that is asked for: float32 (B, C), one-hot (B, C) -> (B,)."""
    import tensorflow as tf

    return tf.reduce_sum(logits * asked, axis=1) - tf.reduce_logsumexp(logits - 1e9 * asked, axis=1)


def shared_verifier(model, data, recipe, seed: int):
    """One CNN trained as the ten are, on all their images, in as many steps; the learning rate falls once.

    Returns:
        The network: uint8 (B, H, W, channels) -> logits (B, C).
    """
    import keras
    import tensorflow as tf

    import mscnn_helpers as mscnn

    ten = mscnn.Stage2Trainer(model, data, recipe)
    count = ten.ROUNDS * ten.steps * ten.batch_size
    draw = mixed_draw(data.train.labels, ten.probability, count, np.random.default_rng(seed))
    network = model.new_stage2(name="shared")
    network.set_weights(model.companion.get_weights())
    keras.utils.set_random_seed(seed)
    network.get_layer("augmentation").reseed(seed)
    trainer = mscnn.Trainer(network, data.train.images)
    steps = len(draw.indices) // ten.batch_size

    def loss(truth, logits):  # truth (B, C + 1): what is asked, and whether it is right
        odds = asked_log_odds(logits, truth[:, :-1])
        return tf.nn.sigmoid_cross_entropy_with_logits(truth[:, -1], odds)

    trainer.compile(mscnn.stage2_muon_for(recipe, ten.batch_size, steps), loss, jit_compile=False)
    truth = np.concatenate([draw.asked, draw.right[:, None]], axis=1)
    batches = tf.data.Dataset.from_tensor_slices((draw.indices, truth)).batch(ten.batch_size, drop_remainder=True)
    trainer.fit(batches.prefetch(2), epochs=1, shuffle=False, verbose=2)
    return network


def longer_companion(model, data, recipe, seed: int):
    """The companion trained anew, in more epochs: those of itself and of the ten Stage 2 CNNs, counted in images."""
    import mscnn_helpers as mscnn

    epochs = recipe.companion_epochs + round(len(data.category_names) * recipe.stage2_share * recipe.epochs)
    network = model.new_stage2(name="companion")
    kernel = model.companion.get_layer("whitening").kernel
    network.get_layer("whitening").kernel.assign(kernel)
    mscnn.train_classifier(network, data, dataclasses.replace(recipe, epochs=epochs), seed + 1)
    return network


def _rivals(path: str, seed: int, light: bool, epochs: int) -> dict[str, np.ndarray]:
    """Logits (2, N, C) of the two rivals on both views of calibration and test split."""
    import tensorflow as tf

    import mscnn_helpers as mscnn

    data, model = mscnn.load_dataset("cifar10", light, seed=seed), mscnn.load_model(path)
    model.check_matches(data)
    model.companion.trainable = True
    recipe, found = mscnn.recipe_for(len(data.train), epochs), {}
    for name, make in (("one shared verifier", shared_verifier), ("companion, longer", longer_companion)):
        network = tf.function(make(model, data, recipe, seed))
        for split in ("calibration", "test"):
            found[f"{split} {name}"] = selective.both_views(network, getattr(data, split).images)
    return found


def answers_of(form: selective.Form, seed: int) -> tuple[dict[str, selective.Answers], np.ndarray]:
    """Every second opinion's answers on one seed's test split, and the true labels."""
    outputs = selective.outputs(form, seed)
    rivals = in_fresh_process(_rivals, str(selective.whole_path(form, seed)), seed, form.light, form.epochs)
    calibration, test = (selective.split_of(outputs, name) for name in ("calibration", "test"))
    category = test.category(2)
    found = {"ours": selective.Answers(category, test.ours)}
    for name in ("one shared verifier", "companion, longer", "companion"):
        one, two = (
            split._replace(companion=rivals.get(f"{kind} {name}", split.companion))
            for kind, split in (("calibration", calibration), ("test", test))
        )
        found[name] = selective.Answers(category, selective.combined(selective.companion_odds, one, two))
    return found, outputs["test_labels"]


def table(figures: dict) -> str:
    """Its section of RESULTS.md."""
    methods, interval = figures["methods"], selective.intervals(figures["differences"])

    def column(name: str, measure: str, form: str) -> str:
        return spread([one[measure] for one in methods[name]], form)

    rows = [
        [name, column(name, "aurc", "{:.5f}"), interval(name, "aurc"), column(name, "augrc", "{:.5f}"),
         interval(name, "augrc"), column(name, "auroc_failure", "{:.2%}"), column(name, "fpr95", "{:.1%}")]
        for name in methods
    ]  # fmt: skip
    lines = [
        "## Judges", "",
        "Written by `python benchmarks/judges.py` (see its first lines): ten specialised judges against one for all,",
        "on the same answers of the same Stage 1, on CIFAR-10's test split, seeds "
        f"{', '.join(map(str, figures['seeds']))};",
        "median, in brackets minimum and maximum. Ours against it: relative difference, median and 95 % interval of a",
        "paired bootstrap over images and seeds; below 0 ours is better.", "",
        *markdown(["second opinion", "AURC", "ours against it", "AUGRC", "ours against it", "AUROC of failure",
                   "FPR at 95 % TPR"], rows),
        origin_line(figures),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains the rivals, judges them, and writes judges.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="light mode, seed 0; writes nothing")
    parser.add_argument("--seeds", type=numbers, default=(0, 1, 2), help="of the whole runs (default: 0,1,2)")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    form = selective.QUICK._replace(seeds=(0,)) if options.quick else selective.some_seeds(options.seeds)
    missing = [seed for seed in form.seeds if not selective.is_finished(form, seed)]
    if missing:
        parser.error(f"the whole run of seed {missing[0]} is not there: run quality.py first (--quick: selective.py)")
    figures = {**origin("python benchmarks/judges.py"), "seeds": list(form.seeds)}
    found, labels = zip(*(answers_of(form, seed) for seed in form.seeds), strict=True)
    figures["methods"] = {
        name: [selective.measures(one[name], truth) for one, truth in zip(found, labels, strict=True)]
        for name in found[0]
    }
    figures["differences"] = selective.differences(list(found), list(labels), 1000)
    print(table(figures))
    if not options.quick:
        write("judges", figures, table(figures))


if __name__ == "__main__":
    main()
