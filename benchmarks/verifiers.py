"""Measures which verifier is worth having, ten specialised verifiers among them: verifiers.json and RESULTS.md.

    python benchmarks/verifiers.py           three seeds: over an hour on two cores; can be interrupted
    python benchmarks/verifiers.py --quick   one seed, a tenth of the data: minutes; shows that it works
    python benchmarks/verifiers.py --branches   how much of the base network the ten may share, in branches.json

For each seed a whole model is trained on 30,000 of CIFAR-10's train images. All scores are about the answers of its
Stage 1, are combined with its margin as the model does it, and are calibrated on the same calibration split. They are
measured on the other 15,000 train images: nothing here sees the test split. What is trained is kept in runs/verifiers.
Differences in the training of Stage 2 alone, each against ours:

    ours                          ten whole CNNs (stage2_branch 0), copies of their base network, each on its
                                  category's hard negatives
    stage2_base                   none of the ten: the network that they begin as
    Stage 2 base network, longer  the same network in so many more epochs, as many images as the ten have seen
    one shared verifier           one CNN on all ten draws, mixed: each image with the category that is asked for
    twice as many steps           of each of the ten
    wider: 48/96/96               base network and the ten, with over twice the multiply-adds
    negatives by both networks    drawn by the base network's softmax as much as by Stage 1's
    negatives by cross-fitting    drawn by the softmax of base networks that have not been trained on the image
    blends as negatives           further images to be called incorrect: mostly c, a little of a hard negative of c
    Stage 1's features as input   a further dense layer of each of the ten sees those of the frozen Stage 1
    four shifted views more       the ten as they are asked about five views and their mirror images

And in the decision alone, with the ten as they are:

    no verifier                   Stage 1's margin by itself, with coefficients per category
    one row for all               of the calibration, in place of one per category
    a third, fourth, ... sign     in the logistic regression: what else the networks say (see `all_signs`)
"""

import argparse
import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import selective
import tensorflow as tf
from common import ROOT, markdown, numbers, origin, origin_line, read_json, write
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mscnn_helpers as mscnn
from mscnn_parts.decision import confidence_log_odds, fit_category_calibration
from mscnn_parts.optimizers import stage2_optimizer

POLICY = "mixed_bfloat16"
BLENDS = 100  # a category
SHIFTS = ((0, 2), (0, -2), (2, 0), (-2, 0))  # pixels, down and to the right


class Form(NamedTuple):
    """The full form or the quick one."""

    seeds: tuple[int, ...]
    train: int  # images
    unseen: int  # images that measure
    epochs: int  # 0: the default recipe
    name: str  # of its folder in runs/verifiers


FULL = Form((0, 1, 2), 30_000, 15_000, 0, "full")
QUICK = Form((0,), 2_000, 1_000, 2, "quick")


@dataclasses.dataclass
class Trial:
    """A trained model and what an idea may train with."""

    model: object  # mscnn.MultiStageCNN
    data: object  # mscnn.Dataset; its test split are the unseen train images
    recipe: object  # mscnn.Recipe
    seed: int


StageScore = Callable[[np.ndarray, np.ndarray], np.ndarray]  # images, the category asked of each (N,) -> log-odds (N,)


# ---- the base: a whole model for each seed


def split_for(form: Form, seed: int):
    """CIFAR-10, of whose train split some images train, and others take the place of the test split."""
    data = mscnn.load_dataset("cifar10", seed=seed)
    order = np.random.default_rng(seed).permutation(len(data.train))
    train, unseen = (data.train.take(one) for one in np.split(order, [form.train]))
    unseen = unseen.take(np.arange(form.unseen))
    return dataclasses.replace(data, train=train, certification=unseen.take(np.arange(0)), test=unseen)


def base_path(form: Form, seed: int) -> Path:
    return ROOT / "runs" / "verifiers" / form.name / f"seed_{seed}.keras"


def trial_of(form: Form, seed: int) -> Trial:
    """The whole model of a seed, trained if it is not there, and loaded afresh, so that an idea may change it."""
    path = base_path(form, seed)
    data, recipe = split_for(form, seed), mscnn.default_recipe(form.train, form.epochs)
    if not path.is_file():
        model = mscnn.MultiStageCNN.for_dataset(data, POLICY, seed, stage2_branch=0)
        mscnn.train_stage1(model, data, recipe, seed)
        mscnn.train_stage2_base(model, data, recipe, seed)
        mscnn.train_stage2(model, data, recipe, seed)
        model.calibrate(data.calibration)
        model.save(path)
    return Trial(mscnn.load_model(path), data, recipe, seed)


# ---- verifiers


def by_network(network) -> StageScore:
    """Of one network for all categories, by both views."""
    graph = tf.function(lambda images: network(images, training=False), reduce_retracing=True)

    def score(images, category):
        return np.mean([mscnn.log_odds(view, category) for view in selective.both_views(graph, images)], axis=0)

    return score


def by_category(of_one: Callable[[np.ndarray, int], np.ndarray]) -> StageScore:
    """Asks the network of each image's category: `of_one` takes images and their category."""

    def score(images, category):
        odds = np.zeros(len(images))
        for c in np.unique(category):
            odds[category == c] = of_one(images[category == c], int(c))
        return odds

    return score


def ours(trial: Trial) -> StageScore:
    return by_category(trial.model.stage2_log_odds)


def stage2_base(trial: Trial) -> StageScore:
    return by_network(trial.model.stage2_base)


def train_ten(trial: Trial, probability: np.ndarray | None = None) -> StageScore:
    """Trains the ten anew from the Stage 2 base network, with negatives drawn by the given probabilities (N, C)."""
    trainer = mscnn.Stage2Trainer(trial.model, trial.data, trial.recipe)
    trainer.probability = trainer.probability if probability is None else probability
    for c in range(len(trial.data.category_names)):
        trainer.train(c, trial.model.stage2_base, trial.seed + 100 + c)
    return ours(trial)


def twice_as_many_steps(trial: Trial) -> StageScore:
    trial.recipe = dataclasses.replace(trial.recipe, stage2_fraction=2 * trial.recipe.stage2_fraction)
    return train_ten(trial)


def wider(trial: Trial) -> StageScore:
    model = mscnn.MultiStageCNN.for_dataset(trial.data, POLICY, trial.seed, stage2_branch=0, stage2_widths=(48, 96, 96))
    model.stage1.set_weights(trial.model.stage1.get_weights())
    mscnn.train_stage2_base(model, trial.data, trial.recipe, trial.seed)
    trial.model = model
    return train_ten(trial)


def softmax_of(network, images: np.ndarray) -> np.ndarray:
    """Of the images as they are, (N, C)."""
    return softmax(np.concatenate([np.asarray(network(part)) for part in np.array_split(images, 100)]), axis=1)


def negatives_by_both(trial: Trial) -> StageScore:
    images = trial.data.train.images
    squares = [softmax_of(network, images) ** 2 for network in (trial.model.stage1, trial.model.stage2_base)]
    return train_ten(trial, np.sqrt(np.mean(squares, axis=0)))


def negatives_by_cross_fitting(trial: Trial) -> StageScore:
    """Two networks like the base network, each trained on half of the train images, score the other half."""
    train, probability = trial.data.train, np.zeros((len(trial.data.train), len(trial.data.category_names)))
    halves = np.array_split(np.random.default_rng(trial.seed).permutation(len(train)), 2)
    for number, (fitted, other) in enumerate((halves, halves[::-1])):
        network = whitened_stage2_base(trial.model)
        recipe = dataclasses.replace(trial.recipe, epochs=trial.recipe.stage2_base_epochs or trial.recipe.epochs)
        half = dataclasses.replace(trial.data, train=train.take(fitted))
        mscnn.train_classifier(network, half, recipe, trial.seed + 10 + number)
        probability[other] = softmax_of(network, train.images[other])
    return train_ten(trial, probability)


def blends_as_negatives(trial: Trial) -> StageScore:
    """The blends join the train images under no category; Stage 1's softmax makes them hard negatives by itself."""
    data, rng, blends = trial.data, np.random.default_rng(trial.seed), []
    probability = softmax_of(trial.model.stage1, data.train.images)
    for c in range(len(data.category_names)):
        drawn = mscnn.sample_hard_negatives(data.train.labels, probability[:, c], c, 2 * BLENDS, rng)
        own, other = (data.train.images[drawn[half::2]].astype(np.float32) for half in (0, 1))
        blends.append(np.round(0.65 * own + 0.35 * other).astype(np.uint8))
    images, labels = np.concatenate([data.train.images, *blends]), np.full(BLENDS * len(blends), -1)
    trial.data = dataclasses.replace(data, train=mscnn.Split(images, np.concatenate([data.train.labels, labels])))
    return train_ten(trial)


def features_as_input(trial: Trial) -> StageScore:
    """Each of the ten gets a further dense layer, zero at first, on Stage 1's features of both views of the image."""
    model, data = trial.model, trial.data
    usual = selective.pooled_features(model.stage1, data.calibration.images).mean(axis=0)
    more = keras.layers.Dense(len(data.category_names), kernel_initializer="zeros")
    more.build(usual.shape)

    def features(images):
        results = selective.pooled_features(model.stage1, images).mean(axis=0)
        return np.float32((results - usual.mean(axis=0)) / (usual.std(axis=0) + 1e-6))

    class WithFeatures(mscnn.Trainer):
        def __init__(self, network, images, head=None):
            super().__init__(network, images, head)
            self.features, self.more = tf.constant(features(images)), more

        def call(self, inputs, training=False):
            logits = self.network(tf.gather(self.images, inputs), training=training)
            return self.head(logits + self.more(tf.gather(self.features, inputs)))

    trainer = mscnn.Stage2Trainer(model, data, trial.recipe, WithFeatures)
    trained = {}
    for c in range(len(data.category_names)):
        more.set_weights([np.zeros_like(one) for one in more.get_weights()])
        trainer.train(c, model.stage2_base, trial.seed + 100 + c)
        trained[c] = more.get_weights()

    def of_one(images, c):
        kernel, bias = trained[c]
        seen = features(images) @ kernel + bias  # (N, C)
        category = np.full(len(images), c)
        views = selective.both_views(model.stage2_cnn(c), images)
        return np.mean([mscnn.log_odds(view + seen, category) for view in views], axis=0)

    return by_category(of_one)


def shifted_views(trial: Trial) -> StageScore:
    def shifted(images, down, right):
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
        height, width = images.shape[1:3]
        return np.ascontiguousarray(padded[:, 2 + down : 2 + down + height, 2 + right : 2 + right + width])

    def of_one(images, c):
        return np.mean([trial.model.stage2_log_odds(shifted(images, *by), c) for by in ((0, 0), *SHIFTS)], axis=0)

    return by_category(of_one)


# ---- one network for all categories


class Draw(NamedTuple):
    """What the ten Stage 2 CNNs are trained on, for one CNN to be trained on."""

    indices: np.ndarray  # int64 (N,), of the train images
    asked: np.ndarray  # float32 (N, C): 1 where it is asked whether the image shows that category
    correct: np.ndarray  # float32 (N,): whether it does


def mixed_draw(labels: np.ndarray, probability: np.ndarray, count: int, rng: np.random.Generator) -> Draw:
    """The draws of all categories, `count` images each, in random order.

    Args:
        labels: (M,). probability: Stage 1's, (M, C).
    """
    categories = probability.shape[1]
    drawn = [mscnn.sample_hard_negatives(labels, probability[:, c], c, count, rng) for c in range(categories)]
    indices, category = np.concatenate(drawn), np.repeat(np.arange(categories), count)
    order = rng.permutation(len(indices))
    indices, category = indices[order], category[order]
    return Draw(indices, np.eye(categories, dtype=np.float32)[category], np.float32(labels[indices] == category))


def asked_log_odds(logits, asked):
    """Log-odds of the category that is asked for: float32 (B, C), one-hot (B, C) -> (B,)."""
    return tf.reduce_sum(logits * asked, axis=1) - tf.reduce_logsumexp(logits - 1e9 * asked, axis=1)


def shared_verifier(trial: Trial) -> StageScore:
    """One CNN trained as the ten are, on all their images, in as many steps; the learning rate falls once."""
    model, data = trial.model, trial.data
    ten = mscnn.Stage2Trainer(model, data, trial.recipe)
    count = ten.HISTORY_POINTS * ten.steps * ten.batch_size
    draw = mixed_draw(data.train.labels, ten.probability, count, np.random.default_rng(trial.seed))
    network = model.build_stage2(name="shared")
    network.set_weights(model.stage2_base.get_weights())
    keras.utils.set_random_seed(trial.seed)
    network.get_layer("augmentation").reseed(trial.seed)
    trainer = mscnn.Trainer(network, data.train.images)
    steps = len(draw.indices) // ten.batch_size

    def loss(truth, logits):  # truth (B, C + 1): what is asked, and whether it is correct
        odds = asked_log_odds(logits, truth[:, :-1])
        return tf.nn.sigmoid_cross_entropy_with_logits(truth[:, -1], odds)

    trainer.compile(stage2_optimizer(trial.recipe, ten.batch_size, steps), loss, jit_compile=False)
    truth = np.concatenate([draw.asked, draw.correct[:, None]], axis=1)
    batches = tf.data.Dataset.from_tensor_slices((draw.indices, truth)).batch(ten.batch_size, drop_remainder=True)
    trainer.fit(batches.prefetch(2), epochs=1, shuffle=False, verbose=2)
    return by_network(network)


def whitened_stage2_base(model):
    """A new network of the Stage 2 base network's kind, with its whitening."""
    network = model.build_stage2(name="stage2_base")
    network.get_layer("whitening").kernel.assign(model.stage2_base.get_layer("whitening").kernel)
    return network


def longer_stage2_base(trial: Trial) -> StageScore:
    """The Stage 2 base network trained anew, on as many images as itself and the ten Stage 2 CNNs together."""
    recipe = trial.recipe
    of_ten = round(len(trial.data.category_names) * recipe.stage2_fraction * recipe.epochs)
    epochs, network = (recipe.stage2_base_epochs or recipe.epochs) + of_ten, whitened_stage2_base(trial.model)
    mscnn.train_classifier(network, trial.data, dataclasses.replace(recipe, epochs=epochs), trial.seed + 1)
    return by_network(network)


def branched(blocks: int, views: int = 3, steps: int = 1) -> Callable[[Trial], StageScore]:
    """The ten share the first blocks of the base network, and are trained on its features of some views.

    Args:
        steps: so many times as many.
    """

    def score(trial: Trial) -> StageScore:
        model = mscnn.MultiStageCNN.for_dataset(trial.data, POLICY, trial.seed, stage2_branch=blocks)
        model.stage1.set_weights(trial.model.stage1.get_weights())
        model.stage2_base.set_weights(trial.model.stage2_base.get_weights())
        fraction = steps * trial.recipe.stage2_fraction
        trial.model, trial.recipe = model, dataclasses.replace(trial.recipe, views=views, stage2_fraction=fraction)
        return train_ten(trial)

    return score


BRANCHES: dict[str, Callable[[Trial], StageScore]] = {
    "ours": ours,
    "block 1 shared": branched(1),
    "blocks 1 and 2 shared": branched(2),
    "blocks 1 and 2 shared, a single view": branched(2, 1),
    "blocks 1 and 2 shared, twice as many steps": branched(2, steps=2),
    "all blocks shared": branched(3),
    "all blocks shared, a single view": branched(3, 1),
    "all blocks shared, 8 views": branched(3, 8),
}
SCORES: dict[str, Callable[[Trial], StageScore]] = {
    "ours": ours,
    "stage2_base": stage2_base,
    "four shifted views more": shifted_views,
    "one shared verifier": shared_verifier,
    "Stage 2 base network, longer": longer_stage2_base,
    "negatives by cross-fitting": negatives_by_cross_fitting,
    "twice as many steps": twice_as_many_steps,
    "Stage 1's features as input": features_as_input,
    "blends as negatives": blends_as_negatives,
    "negatives by both networks": negatives_by_both,
    "wider: 48/96/96": wider,
}


# ---- what each of them says, computed once


def _first_score(form: Form, seed: int) -> dict[str, np.ndarray]:
    """Stage 1's answers on both splits, and signs for the decision, see `all_signs`."""
    trial, results = trial_of(form, seed), {}
    model = trial.model
    for name, split in (("calibration", trial.data.calibration), ("unseen", trial.data.test)):
        views = model.stage1_outputs(split.images)
        logits = views.logits.mean(axis=0).astype(np.float64)
        category = logits.argmax(axis=1)
        other = selective.both_views(model.stage2_base, split.images).mean(axis=0)
        ranked = np.sort(logits, axis=1)[:, ::-1]
        results |= {
            f"{name}_category": category, f"{name}_labels": split.labels,
            f"{name}_margin": mscnn.margin(logits, category),
            f"{name}_signs": np.column_stack([
                *(mscnn.margin(view, category) for view in views.logits), ranked[:, :1] - ranked[:, 2:5],
                mscnn.log_odds(logits, category), mscnn.log_odds(other, category), mscnn.margin(other, category),
                np.logaddexp.reduce(logits, axis=1), np.logaddexp.reduce(other, axis=1),
                np.linalg.norm(selective.pooled_features(model.stage1, split.images).mean(axis=0), axis=1),
            ]),
        }  # fmt: skip
    return results


def _second_score(form: Form, seed: int, name: str) -> dict[str, np.ndarray]:
    """Log-odds of Stage 1's answers on both splits."""
    trial = trial_of(form, seed)
    splits = {"calibration": trial.data.calibration, "unseen": trial.data.test}
    category = {key: trial.model.stage1_outputs(split.images).logits.mean(axis=0) for key, split in splits.items()}
    score = (SCORES | BRANCHES)[name](trial)
    return {key: score(split.images, category[key].argmax(axis=1)) for key, split in splits.items()}


def kept(form: Form, seed: int, name: str, compute: Callable, *arguments) -> dict[str, np.ndarray]:
    """What `compute` gives for a seed's whole model, which it makes if it is not there: see `selective.kept`."""
    model = base_path(form, seed)
    path = model.with_name(f"{model.stem} {name.replace('/', '-')}.npz")
    return selective.kept(path, [model], compute, form, seed, *arguments)


# ---- decisions


def fitted(first: dict, second: dict, a_row_each: bool = True) -> np.ndarray:
    """Confidences by rows that are fitted on the calibration split as the model does it, (N,).

    Args:
        a_row_each: a row per category; else the common row for all.
    """
    category, labels = first["calibration_category"], first["calibration_labels"]
    seen = first["calibration_margin"], second["calibration"], category == labels
    rows = np.tile(mscnn.fit_shared_calibration(*seen), (labels.max() + 1, 1))
    if a_row_each:
        rows = fit_category_calibration(category, *seen, rows[0], range(len(rows)))
    odds = confidence_log_odds(rows, first["unseen_category"], first["unseen_margin"], second["unseen"])
    return expit(odds)


def one_row(first: dict, second: dict) -> np.ndarray:
    return fitted(first, second, a_row_each=False)


def no_second_score(first: dict, second: dict) -> np.ndarray:
    return fitted(first, {name: np.zeros_like(odds) for name, odds in second.items()})


def all_signs(first: dict, second: dict) -> np.ndarray:
    """Confidences by a regression of everything at hand, (N,).

    Both stages' scores; Stage 1's margin of each view, its lead over the third to fifth category and its log-odds;
    the base network's log-odds and margin; the energies of both; the length of Stage 1's features; the category.
    """

    def table(split: str) -> np.ndarray:
        one_hot = np.eye(first["calibration_category"].max() + 1)[first[f"{split}_category"]]
        return np.column_stack([first[f"{split}_margin"], second[split], first[f"{split}_signs"], one_hot])

    correct = first["calibration_category"] == first["calibration_labels"]
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=5000)).fit(
        table("calibration"), correct
    )
    return fitted.predict_proba(table("unseen"))[:, 1]


DECISIONS = {
    "no verifier": no_second_score, "one row for all": one_row, "a third, fourth, ... sign": all_signs,
}  # fmt: skip


class UnseenAnswers(NamedTuple):
    """What all ideas say of one seed's unseen images."""

    answers: dict[str, selective.Answers]
    labels: np.ndarray  # (N,)
    images: np.ndarray  # SHA-256 of each, (N,)
    commits: set[str]  # of the code that trained and asked


def digests(images: np.ndarray) -> np.ndarray:
    """SHA-256 of each image, (N,), by which seeds know those that they share."""
    return np.array([hashlib.sha256(one.tobytes()).hexdigest() for one in images])


def unseen_answers(form: Form, seed: int, ideas: Iterable[str]) -> UnseenAnswers:
    first = kept(form, seed, "Stage 1", _first_score)
    second = {name: kept(form, seed, name, _second_score, name) for name in ideas}
    commits = {str(one.pop("commit")) for one in (first, *second.values())}
    second = {name: {split: one[split] for split in ("calibration", "unseen")} for name, one in second.items()}
    confidence = {name: fitted(first, odds) for name, odds in second.items()}
    confidence |= {name: decide(first, second["ours"]) for name, decide in DECISIONS.items()}
    category = first["unseen_category"]
    answers = {name: selective.Answers(category, one) for name, one in confidence.items()}
    return UnseenAnswers(answers, first["unseen_labels"], digests(split_for(form, seed).test.images), commits)


# ---- RESULTS.md

HEADER = ["verifier", "AURC", "against ours", "AUGRC, against ours", "AUROC of failure", "FPR at 95 % TPR",
          "interval"]  # fmt: skip
CENTRAL = ("one shared verifier", "Stage 2 base network, longer", "stage2_base")  # against ten


def table(figures: dict, branches: bool = False) -> str:
    """Its section of RESULTS.md: those that would be better than ours first."""
    results, differences = figures["methods"], figures["differences"]

    def against_ours(name: str, measure: str) -> list[float]:
        """The relative difference to ours, and its interval: [lower, middle, upper]."""
        return [1 / (1 + end) - 1 for end in reversed(differences[measure][name])]

    def interval(name: str, measure: str) -> str:
        if name == "ours":
            return ""
        low, middle, high = against_ours(name, measure)
        return f"{middle:+.1%} ({low:+.1%} to {high:+.1%})"

    def verdict(name: str) -> str:
        low, _, high = (0, 0, 0) if name == "ours" else against_ours(name, "aurc")
        return "below 0" if high < 0 else "above 0" if low > 0 else ""

    def mean(name: str, measure: str) -> float:
        return float(np.mean([one[measure] for one in results[name]]))

    def row(name: str) -> list[str]:
        return [
            name, f"{mean(name, 'aurc'):.5f}", interval(name, "aurc"), interval(name, "augrc"),
            f"{mean(name, 'auroc_failure'):.2%}", f"{mean(name, 'fpr95'):.1%}", verdict(name),
        ]  # fmt: skip

    shown = [name for name in results if not branches or name in (*BRANCHES, "no verifier")]
    rows = [row(name) for name in sorted(shown, key=lambda name: mean(name, "aurc"))]
    title, command = ("Branches", "verifiers.py --branches") if branches else ("Verifiers", "verifiers.py")
    lines = [
        f"## {title}", "",
        f"Written by `python benchmarks/{command}` (see its first lines for the ideas). All score the same answers",
        f"of the same Stage 1, trained on {figures['images'][0]:,} of CIFAR-10's train images, and are measured by "
        f"{figures['images'][1]:,} others;", f"seeds {', '.join(map(str, figures['seeds']))}, mean. Against ours: "
        "relative difference, median and 95 % interval of a paired bootstrap over", "images and seeds; below 0 the "
        "idea is better. The last column is empty where the interval of the AURC holds 0. Of so many comparisons one",
        "may miss 0 by chance.", "",
    ]  # fmt: skip
    if branches:
        lines += [
            "*Ours* are ten whole CNNs. The others share the first blocks of their base network. The default is the",
            "deepest whose mean AURC is within 2 % of theirs. The other train images stand for the calibration split,",
            "whose 2,500 images could not tell 2 % from chance.", "",
        ]  # fmt: skip
    else:
        lines += [
            "The central question first: are ten verifiers better than one?", "",
            *markdown(HEADER, [row(name) for name in ("ours", *CENTRAL) if name in results]), "All ideas:", "",
        ]  # fmt: skip
    lines += markdown(HEADER, rows)
    if not branches:
        lines += [
            "What is better here and not kept: cross-fitting needs two more trainings, of half a base network each, "
            "and a", "retraining of one category would need their scores of all train images again, or both networks "
            "in the", "model file. Wider networks double the multiply-adds of the verifier, and the model file.", "",
        ]  # fmt: skip
    lines.append(origin_line(figures))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains what is missing, measures, and writes verifiers.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few images; replaces no full figures")
    parser.add_argument("--branches", action="store_true", help="how much of the base network the ten may share")
    parser.add_argument("--seeds", type=numbers, default=(), help="only these: before all have been trained")
    options = parser.parse_args()
    form = QUICK if options.quick else FULL._replace(seeds=options.seeds or FULL.seeds)
    ideas, name = (BRANCHES, "branches") if options.branches else (SCORES, "verifiers")
    chosen = " --branches" * options.branches
    chosen += " --quick" if options.quick else f" --seeds {','.join(map(str, options.seeds))}" if options.seeds else ""
    figures = origin(f"python benchmarks/verifiers.py{chosen}")
    figures |= {"seeds": list(form.seeds), "images": [form.train, form.unseen]}
    results, labels, images, commits = zip(*(unseen_answers(form, seed, ideas) for seed in form.seeds), strict=True)
    _, which = np.unique(np.stack(images), return_inverse=True)
    figures["commit"] = ", ".join(sorted(set.union(*commits)))
    figures["methods"] = {
        name: [selective.measures(one[name], truth) for one, truth in zip(results, labels, strict=True)]
        for name in results[0]
    }
    figures["differences"] = selective.differences(
        list(results), list(labels), 1000, list(which.reshape(len(results), -1))
    )
    section = table(figures, options.branches)
    print(section)
    if selective.replaces(figures["command"], read_json(name, figures)["command"]):
        write(name, figures, section)


if __name__ == "__main__":
    main()
