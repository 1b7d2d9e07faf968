"""Measures how well a confidence tells correct answers from incorrect ones, ours against every baseline.

    python benchmarks/selective.py                 five seeds, a pool of nine Stage 1 networks: hours on two cores
    python benchmarks/selective.py --quick         two seeds and a pool of three in light mode: some five minutes
    python benchmarks/selective.py --train 0,1     only train what is missing for these seeds; can be interrupted
    python benchmarks/selective.py --seeds 0,1     these seeds alone: ensembles of their own networks, no dropout
    python benchmarks/selective.py --tables        only ask what has been trained, and write the tables

Trained models are kept in runs/selective, whole runs where quality.py keeps them, and not trained twice. For each seed
all methods rank answers of the same frozen Stage 1, on the same test split, which is used for nothing else; what a
method has to fit or to choose, it fits on the same calibration split. Those from softmax to temperature, and
neighbours rank its answers on a single view; mirror, Stage 2 base network, one-vs-rest and ours those by two, at the
image and its mirror image. Ensembles give answers of their own, and are also asked about those by two views.

The definitions and sources of the measures stand in mscnn_parts/metrics.py. The methods:

    softmax           maximum softmax probability (MSP), as log-odds in float64 (Hendrycks & Gimpel 2017)
    margin            largest minus second largest logit
    entropy           negative entropy of the softmax
    p-norm            MaxLogit-pNorm: largest centred logit over the logits' p-norm, p by calibration (Cattelan & Silva
                      2024)
    temperature       softmax at a temperature fitted on calibration (temperature scaling, Guo et al. 2017)
    mirror            test-time augmentation: logits averaged over the image and its mirror image; by softmax, by
                      softmax at a fitted temperature, by p-norm, by margin, and by that margin combined as ours
                      without a verifier (a logistic regression of one sign, a row per category)
    dropout           Monte-Carlo dropout: mean softmax of ten passes with dropout before the dense layer (Gal &
                      Ghahramani 2016), by a Stage 1 of its own, which was trained with it; in the full form for three
                      of the seeds
    neighbours        deep nearest neighbours: distance to the k-th nearest train image in Stage 1's features, k by
                      calibration (Sun et al. 2022)
    Stage 2 base network  its log-odds and Stage 1's margin, combined as ours: no ten verifiers
    one-vs-rest       Stage 2's own sigmoid, the classic rule
    ensemble of 2, 5  deep ensembles: mean softmax of so many Stage 1 networks (Lakshminarayanan et al. 2017); also the
                      margin of their mean logits
    ours              Stage 1 and the Stage 2 CNN of its answer, combined; also on one view alone; and on two views, but
                      for the answers on a single view, whose easiest errors a second view would not have made; and with
                      the OOD rejection: what is out of distribution is accepted last, in no order
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import targets
import tensorflow as tf
from common import (
    ROOT,
    commit,
    commit_of_run,
    in_fresh_process,
    markdown,
    numbers,
    origin,
    origin_line,
    read_json,
    sha256,
    spread,
    write,
)
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_softmax, softmax
from sklearn.metrics import brier_score_loss
from speed import multiply_adds, our_network

import mscnn_helpers as mscnn
from mscnn_parts.decision import confidence_log_odds, fit_category_calibration
from mscnn_parts.files import read_model_config
from mscnn_parts.metrics import augrc, calibration_error, coverage_at_risk, e_aurc, risk_at_coverage
from mscnn_parts.model_files import check_matches
from mscnn_parts.networks import STAGE1_WIDTHS, STAGE2_WIDTHS

COVERAGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
ERRORS = (0.01, 0.005)
NEIGHBOURS = (1, 10, 50)
NORMS = (2, 3, 4, 5, 6, 8)
DROPOUT, PASSES = 0.3, 10
RISK = 0.01  # that a certificate is asked for
THRESHOLD = 0.7  # the classic rule's, and the model's own default
# The rooms on which a model's outputs depend: a change of any other costs no new outputs.
DECIDING_ROOMS = (
    "settings", "data", "sources", "decision", "thresholds", "ood", "kernels", "layers", "networks", "inference",
    "model_files", "model",
)  # fmt: skip
ENOUGH = 200  # test images of a predicted category, to say how well it is calibrated


class Form(NamedTuple):
    """The full form or the quick one."""

    seeds: tuple[int, ...]
    pool: tuple[int, ...]  # seeds of the Stage 1 networks that ensembles are drawn from, the form's own among them
    sizes: tuple[int, ...]  # of ensembles
    dropout: tuple[int, ...]  # seeds for which a Stage 1 with dropout is trained
    arguments: str  # of the command line
    light: bool
    epochs: int  # 0: the default recipe
    name: str  # of its folder in runs/selective
    runs: str  # folder of a seed's whole run
    root: Path = ROOT  # of both folders


SIZES = (2, 5)
FULL = Form(
    (0, 1, 2, 3, 4), tuple(range(9)), SIZES, (0, 1, 2),
    "--epochs 0 --batch_size 0", False, 0, "full", "runs/quality/full_{}",
)  # fmt: skip
QUICK = Form(
    (0, 1), (0, 1, 2), (2,), (0, 1),
    "--epochs 2 --batch_size 0 --light_mode", True, 2, "light", "runs/selective/light/seed_{}",
)  # fmt: skip


def some_seeds(seeds: tuple[int, ...]) -> Form:
    """The full form on these seeds alone, for a result before hours have gone by."""
    sizes = tuple(size for size in SIZES if size <= len(seeds))
    name = "_".join(["seeds", *map(str, seeds)])
    return FULL._replace(seeds=seeds, pool=seeds, sizes=sizes, dropout=(), name=name)


# ---- training: each model once


def store(form: Form) -> Path:
    return form.root / "runs" / "selective" / form.name


def whole_path(form: Form, seed: int) -> Path:
    return form.root / form.runs.format(seed) / "multistage_cnn_model.keras"


def is_finished(form: Form, seed: int) -> bool:
    """Whether a whole run has come to its end: the model file is there before."""
    metrics = whole_path(form, seed).with_name("metrics.json")
    return metrics.is_file() and "two_stage" in json.loads(metrics.read_text(encoding="utf-8"))


def single_path(form: Form, seed: int, dropout: bool) -> Path:
    return store(form) / f"stage1_{seed}{'_dropout' * dropout}.keras"


def untrained(form: Form) -> list[Path]:
    """The model files that the form needs and that are not there."""
    whole = [whole_path(form, seed) for seed in form.seeds if not is_finished(form, seed)]
    single = [single_path(form, seed, dropout=False) for seed in form.pool if seed not in form.seeds]
    single += [single_path(form, seed, dropout=True) for seed in form.dropout]
    return whole + [path for path in single if not path.is_file()]


def note_commit(model: Path, trained: str) -> None:
    """Writes beside a model the commit at which it was trained."""
    model.with_suffix(".commit").write_text(trained + "\n", encoding="utf-8")


def trained_at(model: Path) -> str:
    """The commit at which a model was trained, here or by quality.py."""
    note = model.with_suffix(".commit")
    if note.is_file():
        return note.read_text(encoding="utf-8").strip()
    return commit_of_run(model.parent) or "unknown"


def whole_model(form: Form, seed: int) -> Path:
    """The model file of a whole run, which quality.py may have made already; else it is made."""
    path = whole_path(form, seed)
    if not is_finished(form, seed):
        arguments = f"{form.arguments} --seed {seed} --dataset cifar10 --run_dir {form.runs.format(seed)}"
        print(f"python mscnn_helpers.py {arguments}", flush=True)
        command = [sys.executable, str(ROOT / "mscnn_helpers.py"), *arguments.split()]
        command[-1], trained = str(form.root / command[-1]), commit()
        subprocess.run(command, cwd=ROOT, check=True)
        note_commit(path, trained)
    return path


def with_dropout(stage1):
    """The same network with dropout before its dense layer."""
    dropped = keras.layers.Dropout(DROPOUT, name="dropout")(stage1.get_layer("scaled").output)
    return keras.Model(stage1.inputs, stage1.get_layer("logits")(dropped), name="stage1_dropout")


def _train_stage1(form: Form, seed: int, dropout: bool, path: Path) -> None:
    data = mscnn.load_dataset("cifar10", form.light, seed=seed)
    network = mscnn.MultiStageCNN.for_dataset(data, seed=seed).stage1
    network = with_dropout(network) if dropout else network
    mscnn.train_classifier(network, data, mscnn.default_recipe(len(data.train), form.epochs), seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    network.save(partial := path.with_name(f"partial_{path.name}"))
    partial.replace(path)


def single_network(form: Form, seed: int, dropout: bool) -> Path:
    """The file of a Stage 1 of its own; it is trained if it is not there."""
    path = single_path(form, seed, dropout)
    if not path.is_file():
        print(f"Stage 1 of seed {seed}{' with dropout' * dropout}", flush=True)
        trained = commit()
        in_fresh_process(_train_stage1, form, seed, dropout, path)
        note_commit(path, trained)
    return path


def train(form: Form, seeds: tuple[int, ...]) -> None:
    """Trains what is missing for these seeds: whole models for the form's own, Stage 1 alone for others of the pool."""
    for seed in seeds:
        if seed in form.seeds:
            whole_model(form, seed)
            if seed in form.dropout:
                single_network(form, seed, dropout=True)
        else:
            single_network(form, seed, dropout=False)


# ---- outputs: all that the methods need of the networks, for one seed


def both_views(network, images: np.ndarray) -> np.ndarray:
    """Outputs of a network for the images and their mirror images, float64 (2, N, ...)."""
    views = (images, np.ascontiguousarray(images[:, :, ::-1]))
    parts = [[np.asarray(network(view[i : i + 500])) for i in range(0, len(view), 500)] for view in views]
    return np.stack([np.concatenate(part) for part in parts]).astype(np.float64)


def pooled_features(stage1, images: np.ndarray) -> np.ndarray:
    """What Stage 1's dense layer sees of the images and of their mirror images, (2, N, F)."""
    pooled = keras.Model(stage1.inputs, stage1.get_layer("pooled").output)
    return both_views(tf.function(pooled, reduce_retracing=True), images)


def neighbour_distance(train: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Distance to the k-th nearest train feature, all of length 1, for each k of NEIGHBOURS: (len(NEIGHBOURS), N)."""
    train, features = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (train, features))
    nearest = []
    for part in np.array_split(features, max(1, len(features) // 500)):
        squared = np.partition(2 - 2 * part @ train.T, np.array(NEIGHBOURS) - 1, axis=1)  # (part, train)
        nearest.append(squared[:, np.array(NEIGHBOURS) - 1])
    return np.sqrt(np.maximum(np.concatenate(nearest), 0)).T


def dropout_softmax(network, images: np.ndarray, seed: int) -> np.ndarray:
    """Mean softmax of PASSES random passes, (N, C). What lies before the dropout is computed once."""
    before = keras.Model(network.inputs, network.get_layer("scaled").output)
    features, rng = both_views(before, images)[0], np.random.default_rng(seed)  # (N, channels)
    kernel, bias = network.get_layer("logits").get_weights()
    total = 0.0
    for _ in range(PASSES):
        kept = rng.random(features.shape) >= DROPOUT
        total = total + softmax((features * kept / (1 - DROPOUT)) @ kernel + bias, axis=1)
    return total / PASSES


def others(form: Form, seed: int) -> list[int]:
    """The seeds of the Stage 1 networks that join this seed's in ensembles.

    In steps of five: so the pairs of five seeds out of a pool of nine share but one network, and the bootstrap, which
    takes seeds for independent, does not see the same networks again.
    """
    here = form.pool.index(seed)
    return [form.pool[(here + 5 * i) % len(form.pool)] for i in range(1, max(form.sizes, default=1))]


def models_of(form: Form, seed: int) -> list[Path]:
    """The model files that one seed's outputs are of, but for dropout."""
    return [whole_path(form, seed)] + [
        whole_path(form, one) if one in form.seeds else single_path(form, one, False) for one in others(form, seed)
    ]


def dropout_of(form: Form, seed: int) -> list[Path]:
    """The file of its Stage 1 with dropout, if the form has one for this seed."""
    return [single_path(form, seed, dropout=True)] if seed in form.dropout else []


def _outputs(form: Form, seed: int) -> dict[str, np.ndarray]:
    """One seed's outputs on its calibration and test split, and the certification split's for ours."""
    data = mscnn.load_dataset("cifar10", form.light, seed=seed)
    model = mscnn.load_model(whole_path(form, seed))
    check_matches(model, data)
    pool = [
        mscnn.load_model(whole_path(form, one)).stage1 if one in form.seeds
        else keras.models.load_model(single_path(form, one, dropout=False), compile=False)
        for one in others(form, seed)
    ]  # fmt: skip
    train_features = pooled_features(model.stage1, data.train.images)[0]
    results = {}
    for name, split in (("calibration", data.calibration), ("test", data.test)):
        stage1, stage2_base = (both_views(tf.function(one), split.images) for one in (model.stage1, model.stage2_base))
        decisions, stage2 = model.decide(split.images), []
        for category in (stage1[0].argmax(axis=1), stage1.mean(axis=0).argmax(axis=1)):
            odds = np.zeros((2, len(split)))
            for c in np.unique(category):
                here = np.flatnonzero(category == c)
                logits = both_views(model.verifier(c), split.images[here])
                odds[:, here] = [mscnn.log_odds(view, category[here]) for view in logits]
            stage2.append(odds)
        results |= {
            f"{name}_labels": split.labels, f"{name}_stage1": stage1, f"{name}_stage2_base": stage2_base,
            f"{name}_one_stage2": stage2[0], f"{name}_stage2": stage2[1],
            f"{name}_ours": decisions.confidence, f"{name}_in_distribution": decisions.in_distribution,
            f"{name}_distance": neighbour_distance(train_features, pooled_features(model.stage1, split.images)[0]),
        }  # fmt: skip
    # Only of the test split: a network of another seed has been trained on some of this seed's calibration images.
    results["test_pool"] = np.stack(
        [results["test_stage1"][0], *(both_views(one, data.test.images)[0] for one in pool)]
    )
    certified = model.decide(data.certification.images)
    in_distribution = certified.in_distribution
    results["certification_ours"] = certified.confidence[in_distribution]
    results["certification_correct"] = (certified.stage1_category == data.certification.labels)[in_distribution]
    return results


def _dropout_outputs(form: Form, seed: int) -> dict[str, np.ndarray]:
    """Softmax of one seed's Stage 1 with dropout on its test split."""
    network = keras.models.load_model(single_path(form, seed, dropout=True), compile=False)
    images = mscnn.load_dataset("cifar10", form.light, seed=seed).test.images
    return {"test_dropout": dropout_softmax(network, images, seed)}


def kept(path: Path, sources: list[Path], compute: Callable, *arguments) -> dict[str, np.ndarray]:
    """What `compute` gives in a process of its own; from the file of an earlier call, if that is of the same sources.

    With `commit`, that of the code which computed it. A source that is not there yet is made by `compute`.
    """

    def digests() -> list[str]:
        return [sha256(one) for one in sources if one.is_file()]

    if path.is_file():
        with np.load(path) as results:
            if np.array_equal(results.get("sources"), digests()):
                return dict(results)
    print(path.stem, flush=True)
    asked = commit()
    results = {**in_fresh_process(compute, *arguments), "sources": digests(), "commit": asked}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(partial := path.with_name(f"partial_{path.name}"), **results)
    partial.replace(path)
    return results


def outputs(form: Form, seed: int) -> dict[str, np.ndarray]:
    """One seed's outputs, computed once for the same module and models; `commit`: one of each part."""
    code = [ROOT / "mscnn_parts" / f"{room}.py" for room in DECIDING_ROOMS]
    parts = [kept(store(form) / f"outputs_{seed}.npz", [*code, *models_of(form, seed)], _outputs, form, seed)]
    if dropout := dropout_of(form, seed):
        parts.append(kept(store(form) / f"dropout_{seed}.npz", [*code, *dropout], _dropout_outputs, form, seed))
    return {name: value for part in parts for name, value in part.items()} | {"commit": [p["commit"] for p in parts]}


# ---- the methods: each gives the answers (N,), and a confidence (N,) in them, for the test split


class Answers(NamedTuple):
    """What a method says of the test split."""

    category: np.ndarray  # int (N,)
    confidence: np.ndarray  # float64 (N,), which ranks the answers
    probability: np.ndarray | None = None  # (N,), of being right; None: the method claims none


class Split(NamedTuple):
    """One split's outputs, and Stage 1's answers on it."""

    labels: np.ndarray  # (N,)
    stage1: np.ndarray  # logits (2, N, C): of the image, of its mirror image
    stage2_base: np.ndarray  # the same
    stage2: np.ndarray  # log-odds (2, N) by the Stage 2 CNN of Stage 1's answer by both views
    one_stage2: np.ndarray  # the same (2, N) by that of its answer by one view
    ours: np.ndarray  # the model's own confidence (N,)
    distance: np.ndarray  # (len(NEIGHBOURS), N)
    dropout: np.ndarray | None  # softmax (N, C); None: there is none

    def logits(self, views: int) -> np.ndarray:
        """Stage 1's mean logits over one or both views, (N, C)."""
        return self.stage1[:views].mean(axis=0)

    def category(self, views: int) -> np.ndarray:
        """Stage 1's answer by one or both views, (N,)."""
        return self.logits(views).argmax(axis=1)

    def correct(self, views: int) -> np.ndarray:
        return self.category(views) == self.labels

    def margin(self, views: int, answer: int) -> np.ndarray:
        """Stage 1's by so many views, for its answer by so many views, (N,)."""
        return mscnn.margin(self.logits(views), self.category(answer))

    def second(self, views: int, answer: int) -> np.ndarray:
        """Stage 2's log-odds by so many views of Stage 1's answer by so many views, (N,)."""
        return (self.one_stage2 if answer == 1 else self.stage2)[:views].mean(axis=0)


def split_of(results: dict[str, np.ndarray], name: str) -> Split:
    return Split(*(results.get(f"{name}_{field}") for field in Split._fields))


def softmax_odds(logits: np.ndarray, category: np.ndarray | None = None) -> np.ndarray:
    """Log-odds of the answer, or of a given category, (N,): softmax without ties where it rounds to 1."""
    return mscnn.log_odds(logits, logits.argmax(axis=1) if category is None else category)


def negative_entropy(logits: np.ndarray) -> np.ndarray:
    log_p = log_softmax(logits, axis=1)  # (N, C)
    return (np.exp(log_p) * log_p).sum(axis=1)


def p_norm(logits: np.ndarray, p: float) -> np.ndarray:
    centred = logits - logits.mean(axis=1, keepdims=True)
    return centred.max(axis=1) / np.linalg.norm(centred, ord=p, axis=1)


def best_on_calibration(
    candidates: list[Callable[[Split], np.ndarray]], calibration: Split, views: int = 1
) -> Callable:
    """The confidence in answers by so many views with the least AURC on the calibration split."""
    return min(candidates, key=lambda one: mscnn.aurc(one(calibration), calibration.correct(views)))


def best_p_norm(calibration: Split, views: int) -> Callable[[Split], np.ndarray]:
    """With p by the calibration split."""
    return best_on_calibration([lambda s, p=p: p_norm(s.logits(views), p) for p in NORMS], calibration, views)


def temperature(calibration: Split, views: int = 1) -> float:
    """The temperature of least log loss on the calibration split."""

    def loss(log_t: float) -> float:
        log_p = log_softmax(calibration.logits(views) / np.exp(log_t), axis=1)
        return -log_p[np.arange(len(log_p)), calibration.labels].mean()

    return float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded").x))


def combined(
    second: Callable[[Split], np.ndarray], calibration: Split, test: Split, views: int = 2, answer: int = 2
) -> np.ndarray:
    """Stage 1's margin and a verifier's log-odds, combined as the model does it: a row per category, (N,).

    Args:
        views: how many Stage 1's margin is of. answer: how many it answers by.
    """
    one, two = calibration.margin(views, answer), second(calibration)
    category, correct = calibration.category(answer), calibration.correct(answer)
    common, everyone = mscnn.fit_shared_calibration(one, two, correct), range(calibration.stage1.shape[-1])
    rows = fit_category_calibration(category, one, two, correct, common, everyone)
    odds = confidence_log_odds(rows, test.category(answer), test.margin(views, answer), second(test))
    return expit(odds)


def no_odds(split: Split) -> np.ndarray:
    """Of a verifier that has none, (N,)."""
    return np.zeros(len(split.labels))


def stage2_base_odds(split: Split) -> np.ndarray:
    """Of Stage 1's answer by both views, by the Stage 2 base network: the mean over them, (N,)."""
    return np.mean([softmax_odds(view, split.category(2)) for view in split.stage2_base], axis=0)


def softmax_of_pool(results: dict[str, np.ndarray], size: int) -> np.ndarray:
    """Mean softmax of so many Stage 1 networks, the seed's own among them, (N, C)."""
    return softmax(results["test_pool"][:size], axis=-1).mean(axis=0)


def probability_odds(probability: np.ndarray, category: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return softmax_odds(np.log(probability), category)


# ---- the registry


class Evidence:
    """What a method is given of one seed: the calibration split to fit and to choose, the test split to answer."""

    def __init__(self, results: dict[str, np.ndarray]):
        self.results = results
        self.calibration, self.test = (split_of(results, name) for name in ("calibration", "test"))

    def combined(self, second: Callable[[Split], np.ndarray], views: int = 2, answer: int = 2) -> np.ndarray:
        return combined(second, self.calibration, self.test, views, answer)


class Method(NamedTuple):
    """One way to answer and to say how confident the answer is: to add a baseline, add an entry to METHODS."""

    name: str
    predict: Callable[[Evidence], np.ndarray]  # the answers, int (N,)
    confidence: Callable[[Evidence], np.ndarray]  # in them, (N,)
    macs: tuple[float, float]  # in units of Stage 1's and of the Stage 2 base network's
    probability: Callable[[np.ndarray], np.ndarray] | None = None  # of a correct answer, by the confidence; None: none

    def answers(self, evidence: Evidence) -> Answers:
        confidence = self.confidence(evidence)
        claimed = None if self.probability is None else self.probability(confidence)
        return Answers(self.predict(evidence), confidence, claimed)

    def cost(self, stage1: float, stage2_base: float) -> float:
        """Multiply-adds an image, as a multiple of Stage 1's."""
        one, two = self.macs
        return one + two * stage2_base / stage1


def by_one_view(e: Evidence) -> np.ndarray:
    return e.test.category(1)


def by_two_views(e: Evidence) -> np.ndarray:
    return e.test.category(2)


def as_it_is(confidence: np.ndarray) -> np.ndarray:
    """A confidence that is a probability."""
    return confidence


def nearest(e: Evidence) -> np.ndarray:
    near = [lambda s, i=i: -s.distance[i] for i in range(len(NEIGHBOURS))]
    return best_on_calibration(near, e.calibration)(e.test)


def scaled_odds(e: Evidence, views: int) -> np.ndarray:
    return softmax_odds(e.test.logits(views) / temperature(e.calibration, views))


# Where a confidence is log-odds, its sigmoid is the probability; log-odds rank, since a sigmoid rounds to 1.
METHODS = [
    Method("softmax", by_one_view, lambda e: softmax_odds(e.test.logits(1)), (1, 0), expit),
    Method("temperature", by_one_view, lambda e: scaled_odds(e, 1), (1, 0), expit),
    Method("margin", by_one_view, lambda e: e.test.margin(1, 1), (1, 0)),
    Method("entropy", by_one_view, lambda e: negative_entropy(e.test.logits(1)), (1, 0)),
    Method("p-norm", by_one_view, lambda e: best_p_norm(e.calibration, 1)(e.test), (1, 0)),
    Method("neighbours", by_one_view, nearest, (1, 0)),
    Method("ours, one view", by_one_view, lambda e: e.combined(lambda s: s.second(1, 1), 1, 1), (1, 1), as_it_is),
    Method("ours, answers on a single view", by_one_view, lambda e: e.combined(lambda s: s.second(2, 1), 2, 1), (2, 2),
           as_it_is),
    Method("mirror", by_two_views, lambda e: softmax_odds(e.test.logits(2)), (2, 0), expit),
    Method("mirror, temperature", by_two_views, lambda e: scaled_odds(e, 2), (2, 0), expit),
    Method("mirror's p-norm", by_two_views, lambda e: best_p_norm(e.calibration, 2)(e.test), (2, 0)),
    Method("mirror's margin", by_two_views, lambda e: e.test.margin(2, 2), (2, 0)),
    Method("mirror's margin, combined", by_two_views, lambda e: e.combined(no_odds), (2, 0), as_it_is),
    Method("stage2_base", by_two_views, lambda e: e.combined(stage2_base_odds), (2, 2), as_it_is),
    Method("one-vs-rest", by_two_views, lambda e: e.test.second(2, 2), (2, 2), expit),
    Method("ours", by_two_views, lambda e: e.test.ours, (2, 2), as_it_is),
    Method("ours, with the OOD rejection", by_two_views,
           lambda e: np.where(e.results["test_in_distribution"], e.test.ours, -1.0), (2, 2)),
]  # fmt: skip


def by_softmax(name: str, softmax_of: Callable[[Evidence], np.ndarray], size: float) -> Method:
    """A method with a softmax of its own, (N, C), at the cost of so many Stage 1 networks."""

    def predict(e: Evidence) -> np.ndarray:
        return softmax_of(e).argmax(axis=1)

    return Method(name, predict, lambda e: probability_odds(softmax_of(e), predict(e)), (size, 0), expit)


def ensembles(size: int) -> tuple[Method, Method, Method]:
    """Of so many Stage 1 networks: by the margin of their mean logits; about our answers; and by their mean softmax."""
    name = f"ensemble of {size}"

    def logits(e: Evidence) -> np.ndarray:
        return e.results["test_pool"][:size].mean(axis=0)  # (N, C)

    def predict(e: Evidence) -> np.ndarray:
        return logits(e).argmax(axis=1)

    def ours(e: Evidence) -> np.ndarray:
        return probability_odds(softmax_of_pool(e.results, size), by_two_views(e))

    return (
        Method(f"{name}, margin", predict, lambda e: mscnn.margin(logits(e), predict(e)), (size, 0)),
        Method(f"{name}, our answers", by_two_views, ours, (size, 0), expit),
        by_softmax(name, lambda e: softmax_of_pool(e.results, size), size),
    )


def methods_of(results: dict[str, np.ndarray], form: Form) -> list[Method]:
    """The methods that one seed has the networks for."""
    of_pool = [method for kind in zip(*map(ensembles, form.sizes), strict=True) for method in kind]
    dropout = [by_softmax("dropout", lambda e: e.test.dropout, 1)] if "test_dropout" in results else []
    return [*METHODS, *of_pool, *dropout]


def answers(results: dict[str, np.ndarray], form: Form) -> dict[str, Answers]:
    """What each method says of one seed's test split."""
    evidence = Evidence(results)
    return {method.name: method.answers(evidence) for method in methods_of(results, form)}


# ---- the measures


def measures(answer: Answers, labels: np.ndarray) -> dict[str, float]:
    """All measures of one method on one seed's test split."""
    correct, confidence = answer.category == labels, answer.confidence
    results = {
        "accuracy": correct.mean(),
        **mscnn.failure_metrics(confidence, correct),
        "e_aurc": e_aurc(confidence, correct),
        "augrc": augrc(confidence, correct),
        **{f"error at {share:.0%}": risk_at_coverage(confidence, correct, share) for share in COVERAGES},
        **{f"coverage at {error:.1%}": coverage_at_risk(confidence, correct, error) for error in ERRORS},
    }  # fmt: skip
    if answer.probability is not None:
        results["ece"] = calibration_error(answer.probability, correct, bins=15, equal_mass=True)
        results["brier"] = float(brier_score_loss(correct, answer.probability))
        accepted = answer.probability >= THRESHOLD
        results["coverage at the threshold"] = accepted.mean()
        results["error at the threshold"] = 1 - correct[accepted].mean() if accepted.any() else 0.0
    return {name: float(value) for name, value in results.items()}


def calibration_errors(confidence: np.ndarray, category: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """Expected calibration error of all, and the largest of a predicted category with ENOUGH images."""
    large = [here for c in np.unique(category) if (here := category == c).sum() >= ENOUGH]
    errors = [
        calibration_error(confidence[here], correct[here], bins=15, equal_mass=True)
        for here in [np.full(len(category), True), *large]
    ]
    return errors[0], max(errors[1:], default=np.nan)


def promises(results: dict[str, np.ndarray], ours: Answers) -> dict[str, float]:
    """What our confidence promises on one seed's test split: its calibration, and a certificate of RISK.

    Beside the calibration errors stands what a perfect confidence would show on as many images: mean and 95 % quantile
    of 100 simulations, in which each answer is correct with exactly the probability that ours claims.
    """
    category, confidence, _ = ours
    correct, rng = category == results["test_labels"], np.random.default_rng(0)
    simulated = [
        calibration_errors(confidence, category, rng.uniform(size=len(confidence)) < confidence) for _ in range(100)
    ]
    names = ("calibration", "worst calibration")
    result = dict(zip(names, calibration_errors(confidence, category, correct), strict=True))
    for kind, values in (("mean", np.mean(simulated, axis=0)), ("95 %", np.quantile(simulated, 0.95, axis=0))):
        result |= {f"{name}, simulated {kind}": value for name, value in zip(names, values, strict=True)}
    try:
        certificate = mscnn.threshold_for_risk(results["certification_ours"], results["certification_correct"], RISK)
    except mscnn.MSCNNError:  # none can be given
        accepted = np.full(len(correct), False)
    else:
        accepted = (confidence >= certificate.threshold) & results["test_in_distribution"]
    result["certified coverage"] = accepted.mean()
    if accepted.any():
        result["certified error"] = 1 - correct[accepted].mean()
    return {name: float(value) for name, value in result.items() if not np.isnan(value)}


class Resampled(NamedTuple):
    """Measures of resamples, (R,) each."""

    aurc: np.ndarray
    augrc: np.ndarray


def resampled(answer: Answers, labels: np.ndarray, counts: np.ndarray) -> Resampled:
    """AURC and AUGRC of each resample: counts (R, N) says how often each image is in it.

    Ties are averaged, as in the module; an image that is drawn several times ties with itself. A group of w images,
    e of them wrong, behind W others with E errors adds sum over k = 1..w of (E + e k / w) / (W + k) to the AURC: a
    difference of harmonic numbers.
    """
    order = np.argsort(-answer.confidence, kind="stable")
    starts = np.flatnonzero(np.diff(answer.confidence[order], prepend=np.inf))  # of the groups, G of them
    counts = counts[:, order].astype(np.float64)  # (R, N)
    size = np.add.reduceat(counts, starts, axis=1)  # (R, G)
    errors = np.add.reduceat(counts * (answer.category != labels)[order], starts, axis=1)
    before, errors_before = (np.cumsum(one, axis=1) - one for one in (size, errors))
    total = counts.sum(axis=1)  # (R,)
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, total.max() + 1))])
    passed = harmonic[(before + size).astype(int)] - harmonic[before.astype(int)]
    rate = np.divide(errors, size, out=np.zeros_like(size), where=size > 0)
    aurc = (errors + (errors_before - rate * before) * passed).sum(axis=1) / total
    undetected = (errors_before * size + errors * (size + 1) / 2).sum(axis=1) / total  # errors accepted, summed over k
    return Resampled(aurc, (undetected - errors.sum(axis=1) / total / 2) / total)


def resamples_of(count: int, resamples: int, rng: np.random.Generator) -> list[np.ndarray]:
    """How often each of so many images is drawn, parts of 50 resamples, uint8 (50, count)."""
    equal = np.full(count, 1 / count)
    return [rng.multinomial(count, equal, 50).astype(np.uint8) for _ in range(resamples // 50)]


def differences(
    all_answers: list[dict[str, Answers]],
    all_labels: list[np.ndarray],
    resamples: int,
    all_images: Sequence[np.ndarray] | None = None,
) -> dict:
    """Paired bootstrap of the relative difference of AURC and AUGRC, ours against each method.

    Images are resampled, and so are the seeds. An image is drawn equally often for all methods and for all seeds that
    share it: what chance does to one, it does to all at once. Percentiles of few resampled seeds are a little too near
    to each other: the spread between S seeds comes out smaller by the root of (S - 1) / S.

    Args:
        all_answers: of each seed; a method that some seeds lack is compared on the others.
        all_labels: (N,) for each seed. all_images: int (N,) for each seed, which image each one is, from 0 without
            gaps; None: the seeds have the same images.

    Returns:
        {measure: {method: [lower end of the 95 % interval, median, upper end]}}; negative: ours is better.
    """
    all_images = [np.arange(len(one)) for one in all_labels] if all_images is None else all_images
    drawn = resamples_of(1 + max(one.max() for one in all_images), resamples, np.random.default_rng(0))
    results: list[dict[str, Resampled]] = []  # of each seed, (R,) each
    for answers_, labels, images in zip(all_answers, all_labels, all_images, strict=True):
        parts = {
            name: [resampled(answer, labels, part[:, images]) for part in drawn] for name, answer in answers_.items()
        }
        results.append({name: Resampled(*map(np.concatenate, zip(*part, strict=True))) for name, part in parts.items()})

    def mean(name: str, measure: str, having: list[int]) -> np.ndarray:
        """Over resampled seeds, the same ones for all methods that the same seeds have: (R,)."""
        values = np.stack([getattr(results[seed][name], measure) for seed in having])  # (S, R)
        seeds = np.random.default_rng(1).integers(0, len(having), values.shape)
        return np.take_along_axis(values, seeds, axis=0).mean(axis=0)

    def against(name: str, measure: str) -> list[float]:
        having = [seed for seed, methods in enumerate(results) if name in methods]
        ratio = mean("ours", measure, having) / mean(name, measure, having)
        return np.quantile(ratio - 1, [0.025, 0.5, 0.975]).tolist()

    baselines = [name for name in all_methods(all_answers) if name != "ours"]
    return {measure: {name: against(name, measure) for name in baselines} for measure in Resampled._fields}


def all_methods(all_answers: list[dict[str, Answers]]) -> list[str]:
    """Those that at least one seed has."""
    return list(dict.fromkeys(name for methods in all_answers for name in methods))


def compare_methods(form: Form) -> dict:
    """Measures and differences of all methods over the form's seeds."""
    results = [outputs(form, seed) for seed in form.seeds]
    all_answers, labels = [answers(one, form) for one in results], [one["test_labels"] for one in results]
    stage1, stage2_base = (multiply_adds(our_network("float32", widths)) for widths in (STAGE1_WIDTHS, STAGE2_WIDTHS))
    methods = {}
    costs = {m.name: m.cost(stage1, stage2_base) for one in results for m in methods_of(one, form)}
    for name in all_methods(all_answers):
        having = [i for i, one in enumerate(all_answers) if name in one]
        methods[name] = {
            "macs": costs[name], "of": [form.seeds[i] for i in having],
            "seeds": [measures(all_answers[i][name], labels[i]) for i in having],
        }  # fmt: skip
    promised = [promises(one, answer["ours"]) for one, answer in zip(results, all_answers, strict=True)]
    models = [path for seed in form.seeds for path in models_of(form, seed) + dropout_of(form, seed)]
    return {
        "seeds": list(form.seeds), "methods": methods, "promises": promised,
        "stage2_branch": read_model_config(whole_path(form, form.seeds[0]))["config"]["stage2_branch"],
        "trained_at": sorted({trained_at(path) for path in models}),
        "asked_at": sorted({str(asked) for one in results for asked in one["commit"]}),
        "differences": differences(all_answers, labels, 1000),
    }  # fmt: skip


# ---- RESULTS.md

PROMISES = {  # name: heading
    "calibration": "ECE", "calibration, simulated mean": "of a perfect one", "calibration, simulated 95 %": "95 %",
    "worst calibration": "largest of a category", "worst calibration, simulated mean": "of perfect ones",
    "worst calibration, simulated 95 %": "95 %",
    "certified coverage": "coverage, certified", "certified error": "errors",
}  # fmt: skip


def intervals(results: dict) -> Callable[[str, str], str]:
    """From the result of `differences`: a method and a measure -> median and interval; ours has none."""

    def interval(name: str, measure: str) -> str:
        ends = results[measure].get(name)
        return "" if ends is None else f"{ends[1]:+.1%} ({ends[0]:+.1%} to {ends[2]:+.1%})"

    return interval


def table(figures: dict) -> str:
    """Its section of RESULTS.md."""
    methods, interval = figures["results"]["methods"], intervals(figures["results"]["differences"])
    order = sorted(methods, key=lambda name: np.mean([one["aurc"] for one in methods[name]["seeds"]]))

    def label(name: str) -> str:
        of = methods[name]["of"]
        return name + f", seeds {', '.join(map(str, of))}" * (of != figures["results"]["seeds"])

    def column(name: str, measure: str, form: str) -> str:
        values = [one[measure] for one in methods[name]["seeds"] if measure in one]
        return spread(values, form) if values else ""

    first = [
        [label(name), f"{methods[name]['macs']:.2f}", column(name, "accuracy", "{:.2%}"),
         column(name, "aurc", "{:.5f}"), interval(name, "aurc"), column(name, "augrc", "{:.5f}"),
         interval(name, "augrc"), column(name, "auroc_failure", "{:.2%}"), column(name, "fpr95", "{:.1%}")]
        for name in order
    ]  # fmt: skip
    second = [
        [label(name), *(column(name, f"error at {share:.0%}", "{:.2%}") for share in COVERAGES),
         *(column(name, f"coverage at {error:.1%}", "{:.1%}") for error in ERRORS),
         column(name, "e_aurc", "{:.5f}"), column(name, "ece", "{:.2%}"), column(name, "brier", "{:.4f}")]
        for name in order
    ]  # fmt: skip
    rules = [
        [label(name), f"{methods[name]['macs']:.2f}", column(name, "coverage at the threshold", "{:.1%}"),
         column(name, "error at the threshold", "{:.2%}")]
        for name in order if "coverage at the threshold" in methods[name]["seeds"][0]
    ]  # fmt: skip
    third = [
        [str(seed), *(f"{one[name]:.2%}" if name in one else "none" for name in PROMISES)]
        for seed, one in zip(figures["results"]["seeds"], figures["results"]["promises"], strict=True)
    ]
    lines = [
        "## Selective classification", "",
        "Written by `python benchmarks/selective.py` (see its first lines for the methods). Test split of CIFAR-10,",
        f"seeds {', '.join(map(str, figures['results']['seeds']))}; median, in brackets minimum and maximum. The least",
        "mean AURC comes first. Work: multiply-adds an image, Stage 1's are 1. Ours against it: relative difference,",
        "median and 95 % interval of a paired bootstrap over images and seeds; below 0 ours is better. The whole",
        "models are those of the runs under Quality, if they were there; their Stage 2 has "
        f"`--stage2_branch {figures['results']['stage2_branch']}`.",
        "",
        *markdown(["method", "multiply-adds", "accuracy", "AURC", "ours against it", "AUGRC", "ours against it",
                   "AUROC of failure", "FPR at 95 % TPR"], first),
        "Error rate at a coverage, coverage at an error rate, excess AURC, expected calibration error (15 bins of",
        "equal mass) and Brier score; the last two where the confidence is a probability. Softmax, mirror, dropout,",
        "one-vs-rest and the ensembles claim theirs as they are; the others have been fitted on the calibration split.",
        "",
        *markdown(["method", *(f"error at {share:.0%}" for share in COVERAGES),
                   *(f"coverage at {error:.1%}" for error in ERRORS), "E-AURC", "ECE", "Brier"], second),
        *([f"The classic rule, 'at least {THRESHOLD}', with each of these probabilities.", "",
           *markdown(["method", "multiply-adds", "coverage", "error rate"], rules)] if rules else []),
        "What our confidence promises: its expected calibration error, over all images and the largest within a",
        f"predicted category of at least {ENOUGH} images, each beside what a perfectly calibrated confidence shows on",
        "as many images (mean, and what 95 % of simulations stay below); and at the threshold that is certified for",
        f"{RISK:.0%} errors, with probability 95 %, by the certification split: coverage and errors on the test split.",
        "",
        *markdown(["seed", *PROMISES.values()], third),
        f"Models trained at commit {', '.join(figures['results']['trained_at'])}, and asked at "
        f"{', '.join(figures['results']['asked_at'])}. The tables:",
        origin_line(figures),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def replaces(command: str, known: str) -> bool:
    """Whether the figures of one command may take the place of another's: a lesser form never does."""

    def rank(one: str) -> int:
        return 0 if "--quick" in one else 1 if "--seeds" in one else 2

    return rank(command) >= rank(known)


def main() -> None:
    """Trains what is missing, measures, and writes selective.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="light mode, two seeds; replaces no full figures")
    parser.add_argument("--train", type=numbers, default=(), help="seeds: only train what is missing for them")
    parser.add_argument("--seeds", type=numbers, default=(), help="only these; replaces no full figures")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    options = parser.parse_args()

    form = QUICK if options.quick else some_seeds(options.seeds) if options.seeds else FULL
    if options.train:
        return train(form, options.train)
    if options.tables and (absent := untrained(form)):
        parser.error(f"{absent[0].relative_to(form.root)} is not there: leave out --tables, or name trained --seeds")
    chosen = " --quick" if options.quick else f" --seeds {','.join(map(str, form.seeds))}" if options.seeds else ""
    figures = origin(f"python benchmarks/selective.py{chosen}")
    train(form, form.pool)
    figures["results"] = compare_methods(form)
    print(table(figures))
    known = read_json("selective", figures)
    if replaces(figures["command"], known["command"]):
        write("selective", figures, table(figures))
        targets.main()


if __name__ == "__main__":
    main()
