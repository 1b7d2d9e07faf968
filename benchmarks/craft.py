"""Measures what notebooks 07 and 08 compare: from optimizers and augmentation to focal loss and hard negatives.

    python benchmarks/craft.py            what is missing in craft.json: an hour on two quiet cores
    python benchmarks/craft.py --quick    one seed, two rows of each kind: shows that it works, writes nothing
    python benchmarks/craft.py --again "mixup" --again "memory"    rows, or measurements, to be measured anew
    python benchmarks/craft.py --tables   the tables anew, from craft.json

Each row is trained with three seeds, which decide data and initial weights, and stands in craft.json when it is done:
interrupted, the next call goes on. The network is that of Stage 2 at half its width. It is trained on 4,500 of
CIFAR-10's train images, as many as light mode has, and measured on 5,000 others of the train split: nothing here sees
the test split. A row differs from "the base" in what its name says, and is not tuned anew. Those of half precision are
held against "float32", the base again, on the processor that has trained them.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from common import Timed, in_fresh_process, interleaved, markdown, origin, read_json, spread, write
from sklearn.metrics import roc_auc_score
from speed import multiply_adds

import mscnn_helpers as mscnn
from mscnn_parts import diagnosis, networks, tuning
from mscnn_parts.networks import STAGE1_WIDTHS, STAGE2_WIDTHS

WIDTHS = tuple(width // 2 for width in STAGE2_WIDTHS)
SEEDS, BATCH = (0, 1, 2), 64


class Row(NamedTuple):
    """How a network is trained; rate 0 asks the learning rate finder."""

    optimizer: str = "Nesterov"
    rate: float = 0.06
    schedule: str = "our triangle"
    augmentation: str = "recipe"
    dropout: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    policy: str = "float32"
    network: str = "compact"


BASE = Row()
AUGMENTATIONS = (
    "flip",
    "pad and crop",
    "shift 10 %",
    "rotation 10°",
    "color 0.2",
    "blur",
    "blur, half",
    "mixup",
    "cutout",
)
GROUPS: dict[str, dict[str, Row]] = {
    "the base": {"the base": BASE},
    "augmentation": {"none": Row(augmentation="none"), **{name: Row(augmentation=name) for name in AUGMENTATIONS}},
    "optimizers": {name: Row(name, 0) for name in tuning.optimizers(mscnn.Recipe(1, BATCH))},
    "schedules": {name: Row(schedule=name)
                  for name in ("constant", "steps", "cosine", "one-cycle", "cyclic", "on plateau")},
    "regularization": {
        "dropout 0.3": Row(dropout=0.3), "dropout 0.5": Row(dropout=0.5),
        "weight decay 0.0005": Row(weight_decay=5e-4), "weight decay 0.005": Row(weight_decay=5e-3),
        "label smoothing 0.1": Row(label_smoothing=0.1), "label smoothing 0.2": Row(label_smoothing=0.2),
    },
    "precision": {policy: Row(policy=policy) for policy in ("float32", "mixed_bfloat16", "mixed_float16")},
}  # fmt: skip
ROWS = {name: row for rows in GROUPS.values() for name, row in rows.items()}
NETWORKS = {"compact": BASE, "mnist_bn": Row(network="mnist_bn"), "mnist": Row("Adam", 2e-3, network="mnist")}


class Form(NamedTuple):
    """How much is trained and measured."""

    images: int
    unseen: int
    epochs: int
    seeds: tuple[int, ...] = SEEDS


FULL, QUICK = Form(4500, 5000, 6), Form(256, 256, 1, (0,))


# ---- one training


def data_for(form: Form, seed: int) -> mscnn.Dataset:
    """CIFAR-10 with few train images; its "test" split are other images of the train split."""
    data = mscnn.load_dataset("cifar10", seed=seed)
    order = np.random.default_rng(seed).permutation(len(data.train))
    train, unseen = data.train.take(order[: form.images]), data.train.take(order[form.images :][: form.unseen])
    return dataclasses.replace(data, train=train, test=unseen)


def network_for(row: Row, data: mscnn.Dataset, seed: int) -> keras.Model:
    """A new network of the row, uint8 images (B, H, W, channels) -> float32 logits (B, C)."""
    keras.utils.set_random_seed(seed)
    if row.network != "compact":
        mean, std = data.channel_statistics()
        entry, shape, categories = mscnn.NETWORKS[row.network], data.input_shape, len(data.category_names)
        network = networks.build_network(entry, shape, categories, mean, std, data.flip, row.policy, shape[0])
    else:
        sizes = {"stage1_widths": (8, 8, 8), "stage2_widths": WIDTHS}
        network = mscnn.MultiStageCNN.for_dataset(data, row.policy, seed, **sizes).stage2_base
    if row.augmentation != "recipe":
        augmentation = network.get_layer("augmentation")
        augmentation.flip, augmentation.shift = False, 0
    if row.dropout:
        dropped = keras.layers.Dropout(row.dropout, seed=seed)(network.get_layer("scaled").output)
        network = keras.Model(network.inputs[0], network.get_layer("logits")(dropped))
    return network


def batches_for(row: Row, data: mscnn.Dataset, seed: int) -> tf.data.Dataset:
    """Batches of augmented images and one-hot targets."""
    targets = np.eye(len(data.category_names), dtype=np.float32)[data.train.labels]
    batches = tf.data.Dataset.from_tensor_slices((data.train.images, targets))
    batches = batches.shuffle(len(targets), seed=seed).batch(BATCH)
    if row.augmentation not in ("recipe", "none"):
        layer = tuning.augmentations(data.input_shape[0], seed=seed)[row.augmentation]
        batches = batches.map(functools.partial(tuning.augmented, layer), num_parallel_calls=2)
    return batches.prefetch(2)


def compiled(
    row: Row, network: keras.Model, batches: tf.data.Dataset, steps: int, loss: keras.Loss | None = None
) -> float:
    """Compiles the network for the row, and returns the peak of its learning rate; None: the row's cross-entropy."""
    loss = loss or keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=row.label_smoothing)
    make, rate = tuning.optimizers(mscnn.Recipe(1, BATCH))[row.optimizer], row.rate
    if not rate:
        network.compile(loss=loss, jit_compile=False)
        rate = tuning.find_learning_rate(network, batches, make(1e-3), 1e-5, 10.0).suggestion
    plateau = row.schedule == "on plateau"
    optimizer = make(rate if plateau else tuning.schedules(rate, steps)[row.schedule])
    if row.weight_decay:  # of all weights, biases included: Keras takes learning rate x weight decay of each away
        optimizer.weight_decay = row.weight_decay
    if row.policy == "mixed_float16":  # Keras does it by itself only where this is the global policy
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    network.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    return rate


def softmax(network: keras.Model, images: np.ndarray) -> np.ndarray:
    """Probabilities float32 (N, C)."""
    logits = [network.predict_on_batch(images[start : start + 500]) for start in range(0, len(images), 500)]
    return np.asarray(tf.nn.softmax(np.concatenate(logits)))


def trained(row: Row, data: mscnn.Dataset, form: Form, seed: int) -> tuple[keras.Model, dict]:
    """A trained network, and its losses, accuracies and learning rates, epoch by epoch."""
    network, batches = network_for(row, data, seed), batches_for(row, data, seed)
    rate = compiled(row, network, batches, len(batches) * form.epochs)
    callbacks = [tuning.LogLearningRate()]
    if row.schedule == "on plateau":
        callbacks.append(keras.callbacks.ReduceLROnPlateau("loss", 0.3, patience=1, min_delta=0.1, verbose=0))
    begun = time.perf_counter()
    history = network.fit(batches, epochs=form.epochs, verbose=0, shuffle=False, callbacks=callbacks).history
    return network, {"rate": rate, "seconds": time.perf_counter() - begun, **history}


def judged(answers: np.ndarray, confidence: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    correct = answers == labels
    return {"accuracy": float(correct.mean()), "aurc": mscnn.aurc(confidence, correct)}


def train_row(row: Row, form: Form, seed: int) -> dict:
    """Trains a row and measures it on unseen images: accuracy, and AURC of its softmax."""
    data = data_for(form, seed)
    network, history = trained(row, data, form, seed)
    probability = softmax(network, data.test.images)
    keras.backend.clear_session()
    figures = judged(*tuning.mean_softmax(probability[None]), data.test.labels)
    history = {name: np.float64(values).round(6).tolist() for name, values in history.items() if name != "accuracy"}
    return {**figures, "train": history}


def train_ensembles(form: Form, seed: int) -> dict[str, dict]:
    """Five initial weights of one network, and three different networks: each, and together."""
    data, count = data_for(form, seed), 5 if form == FULL else 2
    same = [softmax(trained(BASE, data, form, 10 * seed + i)[0], data.test.images) for i in range(count)]
    others = [softmax(trained(row, data, form, seed)[0], data.test.images) for row in list(NETWORKS.values())[1:]]
    keras.backend.clear_session()
    kinds = {"one network": same[:1], "two initial weights": same[:2], "five initial weights": same,
             "mnist_bn": others[:1], "mnist": others[1:], "three networks": [same[0], *others]}  # fmt: skip
    figures = {}
    for name, members in kinds.items():
        ways = {"mean softmax": tuning.mean_softmax, "majority": tuning.majority_vote}
        for way, decide in ways.items() if len(members) > 1 else [("alone", tuning.mean_softmax)]:
            figures[f"{name}, {way}"] = {
                **judged(*decide(np.stack(members)), data.test.labels),
                "networks": len(members),
            }
    return figures


def ensembles_cost(form: Form) -> dict[str, float]:
    """Multiply-adds of what `train_ensembles` compares, those of one network being 1."""
    data = data_for(form, 0)
    each = {name: multiply_adds(network_for(row, data, 0)) for name, row in NETWORKS.items()}
    ratio = {name: count / each["compact"] for name, count in each.items()}
    keras.backend.clear_session()
    return {"one network": 1.0, "two initial weights": 2.0, "five initial weights": 5.0,
            "mnist_bn": ratio["mnist_bn"], "mnist": ratio["mnist"], "three networks": sum(ratio.values())}  # fmt: skip


def statistics_anew(form: Form) -> dict[str, list[float]]:
    """Accuracy after a constant rate: as trained, and with BatchNormalization's statistics of the weights at rest."""
    found: dict[str, list[float]] = {"constant, as trained": [], "constant, statistics taken anew": []}
    for seed in form.seeds:
        data = data_for(form, seed)
        network, _ = trained(ROWS["constant"], data, form, seed)
        for name, accuracies in found.items():
            if "anew" in name:
                for images, _ in batches_for(ROWS["constant"], data, seed):
                    network(images, training=True)  # moves the statistics, and nothing else
            answers = softmax(network, data.test.images).argmax(axis=1)
            accuracies.append(float((answers == data.test.labels).mean()))
        keras.backend.clear_session()
    return found


def rare_categories(form: Form) -> dict[str, dict[str, list[float]]]:
    """Accuracy where every second category keeps a fifth of its images: by cross-entropy, focal loss, and weights."""
    categorical = {"from_logits": True}
    losses = {
        "cross-entropy": (keras.losses.CategoricalCrossentropy(**categorical), False),
        "focal loss": (keras.losses.CategoricalFocalCrossentropy(alpha=1.0, gamma=2.0, **categorical), False),
        "cross-entropy, rare images weighted": (keras.losses.CategoricalCrossentropy(**categorical), True),
    }
    found: dict[str, dict[str, list[float]]] = {}
    for seed in form.seeds:
        data = data_for(form, seed)
        kept = (data.train.labels % 2 == 0) | (np.random.default_rng(seed).random(len(data.train)) < 0.2)
        data = dataclasses.replace(data, train=data.train.take(np.flatnonzero(kept)))
        counts = np.bincount(data.train.labels, minlength=len(data.category_names))
        for name, (loss, weighted) in losses.items():
            network, batches = network_for(BASE, data, seed), batches_for(BASE, data, seed)
            compiled(BASE, network, batches, len(batches) * form.epochs, loss)
            weights = dict(enumerate(counts.mean() / np.maximum(1, counts))) if weighted else None
            network.fit(batches, epochs=form.epochs, verbose=0, shuffle=False, class_weight=weights)
            hits = softmax(network, data.test.images).argmax(axis=1) == data.test.labels
            each = [float(hits[data.test.labels == c].mean()) for c in range(len(counts))]
            own = found.setdefault(name, {"mean over categories": [], "rare categories": []})
            own["mean over categories"].append(float(np.mean(each)))
            own["rare categories"].append(float(np.mean(each[1::2])))
        keras.backend.clear_session()
    return found


def verifiers_negatives(form: Form) -> dict[str, dict[str, list[float]]]:
    """Verifiers of the pretrained model, retrained on negatives drawn at random and on hard ones.

    On their own batches, and on what they are asked: does the answer of Stage 1 hold? The latter is the AUROC among
    the images of the certification split that Stage 1 takes for a category, mean over the categories.
    """
    data = mscnn.load_dataset("cifar10")  # seed 0: the pretrained model has not seen these held-out images
    if form != FULL:
        data = dataclasses.replace(data, train=data.train.take(np.arange(form.images)))
    model, held = mscnn.load_model("pretrained"), data.certification
    trainer = mscnn.Stage2Trainer(model, data, mscnn.default_recipe(len(data.train), 0 if form == FULL else 1))
    answers = model.decide(held.images).stage1_category
    shown = {"at random": np.zeros_like(trainer.probability), "hard": trainer.probability}
    found: dict[str, dict[str, list[float]]] = {}
    for seed in form.seeds:
        for name, probability in shown.items():
            trainer.probability, own = probability, []
            for category in range(len(data.category_names)):
                history = trainer.train(category, model.stage2_base, seed + 100 + category)
                asked = np.flatnonzero(answers == category)
                correct = held.labels[asked] == category
                scores = model.stage2_log_odds(held.images[asked], category)
                own.append((history["accuracy"][-1], roc_auc_score(correct, scores)))
            columns = found.setdefault(name, {"accuracy on their own batches": [], "AUROC on what they are asked": []})
            for values, mean in zip(columns.values(), np.mean(own, axis=0), strict=True):
                values.append(float(mean))
    return found


# ---- seconds and memory


def augmentation_speed(form: Form) -> dict[str, list[float]]:
    """Images per second of each augmentation alone, in turn, and of the training without any."""
    data = data_for(form, 0)
    images = data.train.images[: BATCH * 8].astype(np.float32)
    targets = np.eye(10, dtype=np.float32)[data.train.labels[: BATCH * 8]]

    def passing(layer):
        step = tf.function(functools.partial(tuning.augmented, layer))

        def task():
            for start in range(0, len(images), BATCH):
                step(tf.constant(images[start : start + BATCH]), tf.constant(targets[start : start + BATCH]))

        return task

    tasks: dict[str, Callable[[], object]] = {
        name: passing(layer) for name, layer in tuning.augmentations(data.input_shape[0]).items()
    }
    tasks["a training step"] = step_task(Row(augmentation="none"), data, images, targets)
    seconds = interleaved(tasks, 5 if form == FULL else 1)
    return {name: [len(images) / one for one in values] for name, values in seconds.items()}


def step_task(row: Row, data: mscnn.Dataset, images: np.ndarray, targets: np.ndarray) -> Callable[[], Timed]:
    """A task that takes training steps on all images, and times what is behind its graph's tracing."""
    network, optimizer = network_for(row, data, 0), tuning.optimizers(mscnn.Recipe(1, BATCH))[row.optimizer](0.01)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if row.policy == "mixed_float16" else optimizer
    network.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True), jit_compile=False)

    def task() -> Timed:
        begun = time.perf_counter()
        for start in range(0, len(images), BATCH):
            network.train_on_batch(images[start : start + BATCH], targets[start : start + BATCH])
        return Timed(time.perf_counter() - begun)

    return task


def precision_speed(form: Form) -> dict[str, list[float]]:
    """Images per second of training steps by dtype policy, in turn."""
    data = data_for(form, 0)
    images, targets = data.train.images[: BATCH * 4], np.eye(10, dtype=np.float32)[data.train.labels[: BATCH * 4]]
    policies = ("float32", "mixed_bfloat16", "mixed_float16")
    tasks = {policy: step_task(Row(policy=policy), data, images, targets) for policy in policies}
    seconds = interleaved(tasks, 5 if form == FULL else 1)
    return {name: [len(images) / one for one in values] for name, values in seconds.items()}


def pipeline_speed(form: Form) -> dict[str, dict[str, list[float]]]:
    """Images per second from JPEG files of 160 pixels: read alone and with training steps, in turn."""
    data = data_for(form, 0)
    shape, some = data.input_shape, data.train.take(np.arange(min(1024, len(data.train))))
    files = [tf.io.encode_jpeg(tf.cast(tf.image.resize(one, (160, 160)), tf.uint8)).numpy() for one in some.images]

    def decode(file):
        image = tf.io.decode_jpeg(file, shape[-1])  # (160, 160, channels)
        return tf.ensure_shape(tf.image.resize(image, shape[:2]), shape)

    one_hot = np.eye(10, dtype=np.float32)[some.labels]
    pipelines = tuning.input_pipelines(np.array(files), one_hot, decode, BATCH)
    network = network_for(BASE, data, 0)
    network.compile(keras.optimizers.SGD(0.01), keras.losses.CategoricalCrossentropy(from_logits=True))

    def passing(batches: tf.data.Dataset, use: Callable) -> Callable[[], object]:
        return lambda: [use(*batch) for batch in batches]

    uses = {"reading alone": lambda *_: None, "with training": network.train_on_batch}
    tasks = {f"{name}/{way}": passing(batches, use)
             for way, use in uses.items() for name, batches in pipelines.items()}  # fmt: skip
    seconds = interleaved(tasks, 5 if form == FULL else 1)
    return {name: {way: [len(files) / one for one in seconds[f"{name}/{way}"]] for way in uses} for name in pipelines}


def diagnosis_cost(form: Form) -> dict[str, dict[str, list[float]]]:
    """What the `Diagnosis` callback takes after an epoch, as a share of the epoch's time, epoch by epoch."""
    found, data = {}, data_for(form, 0)
    for count in (form.images // 3, form.images):
        own = dataclasses.replace(data, train=data.train.take(np.arange(count)))
        network, batches = network_for(BASE, own, 0), batches_for(BASE, own, 0)
        compiled(BASE, network, batches, len(batches) * form.epochs)
        watch = diagnosis.Diagnosis(*own.train)
        network.fit(batches, epochs=form.epochs, verbose=0, shuffle=False, callbacks=[watch])
        shares = [spent / epoch for spent, epoch in zip(watch.seconds, watch.epoch_seconds, strict=True)]
        # The first epoch makes the graph of the training, too.
        found[f"{count:,} train images"] = {"share of an epoch's time": shares[1:] or shares}
        keras.backend.clear_session()
    return found


def peak_memory() -> float:
    """MB at the peak: of the GPU, where there is one, else of this process.

    The latter on Linux only; `resource` would count the process that started this one.
    """
    if tf.config.list_physical_devices("GPU"):
        return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def memory_of(policy: str, batch: int, accumulated: int = 1) -> float:
    """MB that training steps of Stage 1 add to a new process at their peak; in a process of its own."""
    network = mscnn.build_cnn("stage1", (32, 32, 3), 10, STAGE1_WIDTHS, [128] * 3, [64] * 3, True, policy)
    optimizer = keras.optimizers.SGD(0.01, 0.9, gradient_accumulation_steps=accumulated if accumulated > 1 else None)
    network.compile(optimizer, keras.losses.CategoricalCrossentropy(from_logits=True), jit_compile=False)
    before, images = peak_memory(), np.zeros((batch, 32, 32, 3), np.uint8)
    for _ in range(3):
        network.train_on_batch(images, np.eye(10, dtype=np.float32)[np.zeros(batch, int)])
    return peak_memory() - before


def memory_ladder(form: Form) -> dict[str, float]:
    """MB by batch size, with accumulated gradients, and by dtype policy."""
    sizes = (256, 128, 64, 32, 16) if form == FULL else (16,)
    ladder = {f"batch {size}": in_fresh_process(memory_of, "float32", size) for size in sizes}
    ladder["batch 16, accumulated to 256"] = in_fresh_process(memory_of, "float32", 16, 16)
    for policy in ("mixed_bfloat16", "mixed_float16") if form == FULL else ():
        ladder[f"batch {sizes[1]}, {policy}"] = in_fresh_process(memory_of, policy, sizes[1])
    return ladder


class Measurement(NamedTuple):
    """What is measured beside the rows, and how its table looks: a line per name, a column per kind of value."""

    measure: Callable[[Form], dict]
    what: str  # the first column
    values: str = ""  # the second, where there is but one
    form: str = "{:,.0f}"


MEASUREMENTS = {
    "augmentation speed": Measurement(augmentation_speed, "augmentation", "images per second"),
    "precision speed": Measurement(precision_speed, "precision", "images per second"),
    "pipeline speed": Measurement(pipeline_speed, "input pipeline, images per second"),
    "diagnosis": Measurement(diagnosis_cost, "`Diagnosis` after an epoch", form="{:.1%}"),
    "ensembles' cost": Measurement(ensembles_cost, "ensemble", "multiply-adds, one network being 1", "{:.1f}"),
    "statistics": Measurement(statistics_anew, "BatchNormalization", "accuracy", "{:.1%}"),
    "memory": Measurement(memory_ladder, "training step of Stage 1", "MB at its peak"),
    "rare categories": Measurement(rare_categories, "every second category is rare", form="{:.1%}"),
    "negatives": Measurement(verifiers_negatives, "verifiers' negatives", form="{:.1%}"),
}


# ---- RESULTS.md


def section(figures: dict) -> str:
    """Its section of RESULTS.md."""
    lines = [
        "## The craft of training", "",
        "Written by `python benchmarks/craft.py` for notebooks 07 and 08: Stage 2's network at half its width, 4,500",
        "of CIFAR-10's train images, 6 epochs in batches of 64, measured on 5,000 other train images (see the",
        "script's first lines). Median (minimum to maximum) over the seeds; differences are taken seed by seed. Speeds",
        "are over five rounds, the share of `Diagnosis` over five epochs.",
        "So short a training says what a change does *there*, not what it does to a long one. The base flips and",
        "shifts; a row of another augmentation has that one in place of both. The verifiers are those of the",
        "pretrained model, retrained on all train images and measured on the certification split.", "",
    ]  # fmt: skip
    header = [
        "row",
        "seeds",
        "peak rate",
        "accuracy",
        "against the base, points",
        "AURC of softmax",
        "against the base",
    ]
    lines += markdown(header, [line for name in ROWS if (line := row_line(name, figures["rows"]))])
    lines += markdown(["ensemble", "seeds", "accuracy", "AURC of its confidence"], ensemble_lines(figures["ensembles"]))
    for name, table in MEASUREMENTS.items():
        lines += measured_table(table, figures["measurements"].get(name, {}).get("figures", {}))
    lines += [f"- {line}" for line in sorted(origins(figures))]
    return "\n".join(lines)


def measured_table(table: Measurement, figures: dict) -> list[str]:
    """The lines of a measurement's table; none before it has been measured."""
    rows = {name: one if isinstance(one, dict) else {table.values: one} for name, one in figures.items()}
    header = [table.what, *next(iter(rows.values()), {})]
    cells = {name: [spread(np.atleast_1d(v).tolist(), table.form) for v in one.values()] for name, one in rows.items()}
    lines = [[name, *each] for name, each in cells.items()]
    return markdown(header, lines) if rows else []


def row_line(name: str, rows: dict) -> list[str]:
    """A row of the first table; none if it has not been measured with any seed."""
    seeds, base = rows.get(name, {}), rows.get("float32" if name in GROUPS["precision"] else "the base", {})
    paired = [seed for seed in seeds if seed in base]
    if not paired:
        return []
    each, bases = [seeds[seed] for seed in paired], [base[seed] for seed in paired]
    pairs = list(zip(each, bases, strict=True))
    return [
        name, str(len(paired)), spread([one["train"]["rate"] for one in each], "{:.2g}"),
        spread([one["accuracy"] for one in each], "{:.1%}"),
        spread([100 * (one["accuracy"] - other["accuracy"]) for one, other in pairs], "{:+.1f}"),
        spread([one["aurc"] for one in each], "{:.3f}"),
        spread([one["aurc"] / other["aurc"] - 1 for one, other in pairs], "{:+.0%}"),
    ]  # fmt: skip


def ensemble_lines(ensembles: dict) -> list[list[str]]:
    """A line per ensemble, over the seeds that were measured."""
    each = [one["figures"] for one in ensembles.values()]
    return [
        [name, str(len(each)), *(spread([one[name][key] for one in each], form)
                                 for key, form in {"accuracy": "{:.1%}", "aurc": "{:.3f}"}.items())]
        for name in (each[0] if each else ())
    ]  # fmt: skip


def origins(figures: dict) -> set[str]:
    """Where the figures come from: commits, devices and versions."""
    measured = [one for seeds in figures["rows"].values() for one in seeds.values()]
    measured += [*figures["ensembles"].values(), *figures["measurements"].values()]
    return {
        f"commit {one['commit']}, {one['device']}, {', '.join(f'{k} {v}' for k, v in one['versions'].items())}"
        for one in measured
    }


# ---- measuring


def jobs(form: Form) -> list[tuple[str, str, int, Callable[[], dict]]]:
    """What there is to measure: where it stands in craft.json, and what measures it; seed by seed."""
    found: list[tuple[str, str, int, Callable[[], dict]]] = []
    rows = ROWS if form == FULL else {name: row for some in GROUPS.values() for name, row in [*some.items()][:2]}
    for seed in form.seeds:
        found += [("rows", name, seed, functools.partial(train_row, row, form, seed)) for name, row in rows.items()]
        found.append(("ensembles", "", seed, lambda seed=seed: {"figures": train_ensembles(form, seed)}))
        if seed == form.seeds[0]:
            found += [("measurements", name, -1, lambda table=table: {"figures": table.measure(form)})
                      for name, table in MEASUREMENTS.items()]  # fmt: skip
    # What takes minutes comes last: ensembles, and half precision where the processor lacks AMX.
    return sorted(found, key=lambda job: (job[1] in GROUPS["precision"], job[0] == "ensembles"))


def place_of(figures: dict, kind: str, name: str, seed: int) -> tuple[dict, str]:
    """The part of craft.json that holds a figure, and its key there."""
    part = figures[kind].setdefault(name, {}) if kind == "rows" else figures[kind]
    return part, name if kind == "measurements" else str(seed)


def main() -> None:
    """Measures what is missing, and writes craft.json and its section of RESULTS.md after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, very little training; writes nothing")
    parser.add_argument("--again", action="append", default=[], help="a row, ensembles, or a measurement; or several")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    options = parser.parse_args()
    empty: dict[str, dict] = {"rows": {}, "ensembles": {}, "measurements": {}}
    figures = empty if options.quick else read_json("craft", empty)
    for kind, name, seed, measure in jobs(QUICK if options.quick else FULL) if not options.tables else ():
        part, key = place_of(figures, kind, name, seed)
        if key in part and (name or kind) not in options.again:
            continue
        made, begun = origin("python benchmarks/craft.py"), time.perf_counter()
        part[key] = {**made, **measure()}
        said = f", {part[key]['accuracy']:.1%}" if kind == "rows" else ""
        print(f"seed {seed}, {name or kind}{said}: {time.perf_counter() - begun:.0f} s", flush=True)
        if not options.quick:
            write("craft", figures, section(figures))
    if not options.quick:
        write("craft", figures, section(figures))
    print(section(figures))


if __name__ == "__main__":
    main()
