"""Measures speed and memory against what people would use instead, and writes speed.json and RESULTS.md.

    python benchmarks/speed.py                        everything, about an hour on two cores
    python benchmarks/speed.py --quick                fewer and shorter repeats: minutes on two cores
    python benchmarks/speed.py --only training,decide some of the measurements; the others' figures are kept

In training and decide, baselines are measured in turn with ours, each round in another order, in one process, so a
ratio holds on a shared machine, where seconds alone do not. The networks of Keras' own layers and of PyTorch are the
same as ours: whitening, three blocks, average pooling, one dense layer. They train without augmentation and by plain
SGD, which is in their favour. The hand-written step is of our network and optimizer. Keras' own layers and plain `fit`
are timed on both pipelines, its own and ours. PyTorch is optional: pip install ".[bench]". What whole runs take, by
part and by notebook, is measured by quality.py.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import targets
from common import (
    ROOT,
    Timed,
    has_whole_cnns,
    in_fresh_process,
    interleaved,
    markdown,
    origin,
    origin_line,
    read_json,
    spread,
    write,
)

WIDTHS, SIZE, CATEGORIES, BATCH = (64, 256, 256), 32, 10, 512
DATASET = "cifar10"
LEVELS = (0.90, 0.92, 0.93, 0.94)  # test accuracies to be reached
SHORT = 5  # epochs of a training that reaches the lowest level sooner


# ---- what is measured with


def random_images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, 32, 32, 3) and labels; what the images show does not change how long they take."""
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8), np.arange(count) % CATEGORIES


def random_data(count: int, categories: int = CATEGORIES, flip: bool = True):
    """A data set of such images, the first 500 of which are its calibration, certification and test split, too."""
    import mscnn_helpers as mscnn

    train = mscnn.Split(random_images(count)[0], np.arange(count) % categories)
    few, names = train.take(np.arange(500)), tuple(f"category {i}" for i in range(categories))
    return mscnn.Dataset("random", "none", names, train, few, few, few, flip=flip)


def peak_memory_gb() -> float:
    """The largest resident memory of this process so far (Linux; getrusage would tell its parent's, if larger)."""
    (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def multiply_adds(network) -> int:
    """Of one image: places of the output x size of the kernel, over convolutions and the dense layer."""
    kernels = [layer for layer in network.layers if hasattr(layer, "kernel")]
    return sum(int(np.prod(one.output.shape[1:-1]) * np.prod(one.kernel.shape)) for one in kernels)


def training_flop(network) -> int:
    """Of one image, forward and backward: 2 FLOP a multiply-add, forward, for the kernel and for the input.

    But nothing is taken back through the whitening, which stands still, nor into the image.
    """
    kernels = [layer for layer in network.layers if hasattr(layer, "kernel")]
    whitening, first = (int(np.prod(one.output.shape[1:-1]) * np.prod(one.kernel.shape)) for one in kernels[:2])
    return 6 * multiply_adds(network) - 4 * whitening - 2 * first


def our_network(policy: str, widths=WIDTHS, name: str = "stage1"):
    """Stage 1 (or a Stage 2 CNN), as the module builds it."""
    import mscnn_helpers as mscnn

    return mscnn.build_cnn(
        name, (SIZE, SIZE, 3), CATEGORIES, widths, mean=[120.0] * 3, std=[60.0] * 3, flip=True, policy=policy
    )


def stock_keras(policy: str):
    """The same network in Keras' own layers, compiled."""
    import keras

    layers = keras.layers
    x = inputs = keras.Input((SIZE, SIZE, 3))
    x = layers.Rescaling(1 / 60, offset=-2.0, dtype=policy)(x)
    whitening = layers.Conv2D(24, 2, use_bias=False, dtype=policy, trainable=False)
    x = layers.Activation("relu", dtype=policy)(whitening(x))  # (B, 31, 31, 24)
    for width in WIDTHS:
        for half in (1, 2):
            x = layers.Conv2D(width, 3, padding="same", use_bias=False, dtype=policy)(x)
            if half == 1:
                x = layers.MaxPooling2D(2, dtype=policy)(x)
            x = layers.Activation("relu", dtype=policy)(layers.BatchNormalization(scale=False, dtype=policy)(x))
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)  # (B, 256)
    network = keras.Model(inputs, layers.Dense(CATEGORIES, dtype="float32")(x))
    network.compile(
        keras.optimizers.SGD(0.01, momentum=0.85, nesterov=True, weight_decay=0.009),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return network


def hand_written_epoch(policy: str, images: np.ndarray, labels: np.ndarray) -> Callable[[], object]:
    """One epoch of our network by a tf.function on resident data: no fit, no tf.data, no metrics."""
    import tensorflow as tf

    import mscnn_helpers as mscnn

    network, optimizer = our_network(policy), mscnn.stage1_optimizer(mscnn.Recipe(100, BATCH), 100_000)
    optimizer.build(network.trainable_variables)
    weights = [variable.value for variable in network.trainable_variables]
    x, y = tf.constant(images), tf.one_hot(labels, CATEGORIES)

    @tf.function(jit_compile=False)
    def step(index):
        with tf.GradientTape() as tape:
            logits = network(tf.gather(x, index), training=True)  # (B, 10)
            loss = tf.nn.softmax_cross_entropy_with_logits(tf.gather(y, index), logits)
            loss = tf.reduce_mean(loss)
        optimizer.apply(tape.gradient(loss, weights), network.trainable_variables)
        return loss

    def epoch() -> Timed:
        order = tf.random.shuffle(tf.range(len(images)))
        begun = time.perf_counter()
        [step(order[i : i + BATCH]) for i in range(0, len(images), BATCH)][-1].numpy()
        return Timed(time.perf_counter() - begun)

    return epoch


def torch_epoch(bfloat16: bool, compiled: bool, images: np.ndarray, labels: np.ndarray) -> Callable[[], object]:
    """One epoch of the same network in PyTorch, channels last, on resident data."""
    import torch
    from torch import nn

    parts, channels = [nn.Conv2d(3, 24, 2, bias=False), nn.ReLU()], 24
    parts[0].weight.requires_grad_(False)
    for width in WIDTHS:
        for half in (1, 2):
            parts.append(nn.Conv2d(channels, width, 3, padding=1, bias=False))
            parts += [nn.MaxPool2d(2)] if half == 1 else []
            parts += [nn.BatchNorm2d(width), nn.ReLU()]
            parts[-2].weight.requires_grad_(False)  # the others have no scale
            channels = width
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CATEGORIES)]
    network = nn.Sequential(*parts).to(memory_format=torch.channels_last)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01, momentum=0.85, nesterov=True, weight_decay=0.009)
    forward = torch.compile(network) if compiled else network
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)  # NHWC in memory

    def epoch() -> Timed:
        order = torch.randperm(len(images))
        begun = time.perf_counter()
        for i in range(0, len(images), BATCH):
            index = order[i : i + BATCH]
            batch = ((x[index].float() - 120) / 60).contiguous(memory_format=torch.channels_last)  # (B, 3, 32, 32)
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = nn.functional.cross_entropy(forward(batch), y[index], label_smoothing=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()
        return Timed(time.perf_counter() - begun)

    return epoch


def torch_tasks(images: np.ndarray, labels: np.ndarray, quick: bool) -> dict[str, Callable]:
    """The modes of PyTorch, or none with a notice where it is not installed."""
    try:
        import torch
    except ImportError:
        print('PyTorch is not installed, so it is left out: pip install ".[bench]"')
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        print("No C++ compiler is installed, so torch.compile is left out.")
    modes = {
        f"PyTorch {'bfloat16' if bfloat16 else 'float32'}{', torch.compile' if compiled else ''}": (bfloat16, compiled)
        for bfloat16 in (True, False)
        for compiled in ((False, True) if compiler and not quick else (False,))
    }
    return {name: torch_epoch(*mode, images, labels) for name, mode in modes.items()}


def timed_fit(network, batches, **arguments) -> Callable[[], Timed]:
    """A task: one epoch of `fit`, timed from the start of its first step to the end of its last, as the baselines are.

    What `fit` does at an epoch's end is left out: with tf.data's autotuning, as in plain `fit`, its thread sleeps for
    up to a minute before it ends, so that the seconds of a short epoch would say nothing of the steps.
    """
    import keras

    begun, ended = [], []
    timer = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: begun.append(time.perf_counter()),
        on_train_batch_end=lambda batch, logs: ended.append(time.perf_counter()),
    )

    def epoch() -> Timed:
        begun.clear()
        network.fit(batches, callbacks=[timer], verbose=0, **arguments)
        return Timed(ended[-1] - begun[0])

    return epoch


def convolutions(policy: str) -> tuple[Callable[[], object], float]:
    """Stage 1's six 3x3 convolutions, forward and backward, and nothing else; and their FLOP.

    As in training, nothing is taken back into the input of the first. Of TensorFlow's gradient of a kernel and ours,
    the faster is taken, shape by shape.
    """
    import tensorflow as tf

    import mscnn_helpers as mscnn

    dtype = tf.bfloat16 if "bfloat16" in policy else tf.float32
    shapes, channels, size = [], 8 * 3, SIZE - 1
    for width in WIDTHS:
        shapes += [(size, channels, width), (size // 2, width, width)]
        channels, size = width, size // 2
    tensors = [
        (tf.random.normal((BATCH, size, size, one), dtype=dtype), tf.random.normal((3, 3, one, other), dtype=dtype))
        for size, one, other in shapes
    ]

    def run(image, kernel, further, joined):
        result = tf.nn.conv2d(image, kernel, 1, "SAME")
        same = {"out_backprop": result, "strides": [1] * 4, "padding": "SAME"}
        plain = functools.partial(tf.raw_ops.Conv2DBackpropFilter, filter_sizes=tf.shape(kernel), **same)
        results = [mscnn.gradient_of_kernel(image, result) if joined else plain(input=image)]
        if further:
            results.append(tf.raw_ops.Conv2DBackpropInput(input_sizes=tf.shape(image), filter=kernel, **same))
        return [one[0, 0, 0, 0] for one in results]

    parts = [2 + (i > 0) for i in range(len(shapes))]
    flop = sum(
        part * 2 * BATCH * size**2 * 9 * one * other for part, (size, one, other) in zip(parts, shapes, strict=True)
    )

    def faster(i: int) -> Callable:
        ways = [tf.function(functools.partial(run, further=i > 0, joined=one), jit_compile=False) for one in (0, 1)]
        tasks = {str(joined): lambda way=way: [float(r) for r in way(*tensors[i])] for joined, way in enumerate(ways)}
        seconds = {name: min(values) for name, values in interleaved(tasks, 3).items()}
        return tasks[min(seconds, key=seconds.get)]

    tasks = [faster(i) for i in range(len(shapes))]
    return lambda: [task() for task in tasks], flop


# ---- the measurements: each returns a dict for speed.json


def measure_training(quick: bool) -> dict:
    """Training images/s of Stage 1: ours, stock Keras, a hand-written step, PyTorch."""
    import tensorflow as tf

    import mscnn_helpers as mscnn

    policy = mscnn.fastest_policy()
    steps, repeats = (2, 2) if quick else (6, 7)
    images, labels = random_images(steps * BATCH)
    one_hot = np.eye(CATEGORIES, dtype=np.float32)[labels]

    def ours(network, batches) -> Callable[[], object]:
        trainer = mscnn.compile_classifier(network, mscnn.Recipe(100, BATCH), 100_000)
        return timed_fit(trainer, batches, shuffle=False)

    pipeline = mscnn.batches(one_hot, BATCH, shuffle_seed=0)
    one_batch = tf.data.Dataset.from_tensors((images[:BATCH], one_hot[:BATCH])).cache().repeat(steps)
    one_batch = one_batch.with_options(pipeline.options())
    resident = tf.constant(images)
    stock = {name: stock_keras(name) for name in ("float32", "mixed_bfloat16")}
    conv, flop = convolutions(policy)

    plain = mscnn.batches(labels, BATCH, shuffle_seed=0).map(lambda index, y: (tf.gather(resident, index), y))
    tasks = {
        "ours": ours(mscnn.Trainer(our_network(policy), images), pipeline),
        "ours, one resident batch": ours(our_network(policy), one_batch),
        "hand-written step": hand_written_epoch(policy, images, labels),
        "ours in float32": ours(mscnn.Trainer(our_network("float32"), images), pipeline),
        **{f"stock Keras {name}": timed_fit(one, images, y=labels, batch_size=BATCH) for name, one in stock.items()},
        **{f"stock layers {name}, our batches": timed_fit(one, plain, shuffle=False) for name, one in stock.items()},
        **torch_tasks(images, labels, quick), "convolutions alone": conv,
    }  # fmt: skip
    seconds = interleaved(tasks, repeats, warm_up=1 if quick else 3)  # PyTorch warms up slowly
    flops = [flop / one for one in seconds.pop("convolutions alone")]
    network = our_network(policy)
    rates = {name: [len(images) / one for one in values] for name, values in seconds.items()}
    share = [training_flop(network) * a / b for a, b in zip(rates["ours"], flops, strict=True)]
    over_stock = [a / b for a, b in zip(rates["ours in float32"], rates["stock Keras float32"], strict=True)]
    return {
        "policy": policy, "images_per_second": rates, "convolutions_gflops": [one / 1e9 for one in flops],
        "share_of_convolutions": share,
        "float32_over_stock": over_stock,
        "torch": getattr(sys.modules.get("torch"), "__version__", "not installed"),
    }  # fmt: skip


def spread_model(flip: bool, stage2_branch: int = -1):
    """A calibrated model with random weights whose Stage 1 predicts every category about equally often."""
    import mscnn_helpers as mscnn

    data = random_data(2000, flip=flip)
    model = mscnn.MultiStageCNN.for_dataset(data, stage2_branch=stage2_branch)
    dense = model.stage1.get_layer("logits")
    logits = model.stage1_logits(data.train.images)
    # Standardised logits: each category is the largest about as often as any other.
    dense.kernel.assign(dense.kernel.numpy() / logits.std(axis=0))
    dense.bias.assign(-(logits / logits.std(axis=0)).mean(axis=0))
    model.calibration_coefficients.assign(np.tile([0.0, 0.5, 0.5], (CATEGORIES, 1)))
    mscnn.fit_ood(model, data)
    return model


def measure_decide(quick: bool) -> dict:
    """images/s of decide() against Stage 1 alone, by batch size, on one view and on two."""
    repeats, results = (2 if quick else 7), {}
    for views, flip in ((1, False), (2, True)):
        model = spread_model(flip)
        one, two = multiply_adds(model.stage1), multiply_adds(model.stage2_base)
        for batch, count in ((1, 40), (32, 640), (512, 512 if quick else 2048)):
            images, _ = random_images(count)
            parts = [images[i : i + batch] for i in range(0, count, batch)]
            tasks = {
                "stage1": lambda parts=parts, model=model: [model.stage1_logits(part) for part in parts],
                "decide": lambda parts=parts, model=model: [model.decide(part) for part in parts],
            }
            seconds = interleaved(tasks, repeats)
            results[f"batch {batch}, {views} view{'s' * (views > 1)}"] = {
                "stage1_per_second": [count / s for s in seconds["stage1"]],
                "decide_per_second": [count / s for s in seconds["decide"]],
                "ratio_of_times": [b / a for a, b in zip(seconds["stage1"], seconds["decide"], strict=True)],
                "ratio_of_multiply_adds": views * (one + two) / one,
            }
    return results


def _cost_of_branches(blocks: int, categories: int, count: int) -> tuple[float, float]:
    """Seconds to train all Stage 2 CNNs on `count` random images, and MB of the model file."""
    import mscnn_helpers as mscnn

    data = random_data(count, categories)
    model = mscnn.MultiStageCNN.for_dataset(data, stage2_branch=blocks)
    begun = time.perf_counter()
    mscnn.train_stage2(model, data, mscnn.Recipe(20, 256))
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        return seconds, Path(f"{folder}/model.keras").stat().st_size / 1e6


def measure_branches(quick: bool) -> dict:
    """What it costs if Stage 2 CNNs share so many blocks: decide() against Stage 1 alone, training, file."""
    repeats, count, results = (2, 1000, {}) if quick else (7, 20_000, {})
    for blocks in range(4):
        model, ratios = spread_model(True, blocks), {}
        for batch in (1, 512):
            parts = np.array_split(random_images(max(40, batch))[0], max(40, batch) // batch)
            tasks = {
                "stage1": lambda parts=parts, model=model: [model.stage1_logits(part) for part in parts],
                "decide": lambda parts=parts, model=model: [model.decide(part) for part in parts],
            }
            seconds = interleaved(tasks, repeats)
            ratios[str(batch)] = [b / a for a, b in zip(seconds["stage1"], seconds["decide"], strict=True)]
        work = 2 * (1 + multiply_adds(model.stage2_base) / multiply_adds(model.stage1))
        costs = {n: in_fresh_process(_cost_of_branches, blocks, n, count) for n in ((10,) if quick else (10, 100))}
        results[blocks] = {"ratio_of_times": ratios, "ratio_of_multiply_adds": work, "costs": costs}
    return results


def _first_decision(path: str, image: np.ndarray, begun: float) -> list[float]:
    """Seconds of each step to a first decision, and of all; `begun`: when the process was started, by time.time()."""
    moments = [begun, time.time()]
    import mscnn_helpers as mscnn

    moments.append(time.time())
    model = mscnn.load_model(path)
    moments.append(time.time())
    model.decide(image)
    moments.append(time.time())
    return [*np.diff(moments), moments[-1] - begun]


def measure_cold_start(quick: bool) -> dict:
    """Seconds to import, load and decide on a first image, each time in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.keras"
        spread_model(True).save(path)
        image, repeats = random_images(1)[0], 1 if quick else 5
        rounds = [in_fresh_process(_first_decision, path, image, time.time()) for _ in range(repeats)]
    names = ("start of Python, NumPy", "import of the module", "load the model", "first decision", "all")
    return dict(zip(names, map(list, zip(*rounds, strict=True)), strict=True))


def _short_training(seed: int, light: bool, begun: float) -> dict:
    """Trains Stage 1 in SHORT epochs, saves the model, and verifiers it as it is read back.

    Args:
        begun: when the process was started, by time.time().
    """
    import mscnn_helpers as mscnn

    data = mscnn.load_dataset(DATASET, light_mode=light, seed=seed)
    model = mscnn.MultiStageCNN.for_dataset(data, seed=seed)
    mscnn.train_stage1(model, data, mscnn.default_recipe(len(data.train), SHORT), seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.keras")
        saved_after = time.time() - begun
        logits = mscnn.load_model(f"{folder}/model.keras").stage1_logits(data.test.images)
    accuracy = float((logits.argmax(axis=1) == data.test.labels).mean())
    return {"seed": seed, "epochs": SHORT, "accuracy": accuracy, "saved_after": saved_after}


def _whole_runs(kind: str) -> list[dict]:
    """The same record of quality.py's runs on this device, those of 40 epochs among the full ones."""
    import mscnn_helpers as mscnn

    kinds, here = {"light": ("light",), "full": ("full", "long")}[kind], (DATASET, mscnn.device_name())
    return [
        {"seed": run["seed"], "epochs": run["epochs"], "accuracy": run["stage1"]["accuracy"],
         "saved_after": run["stage1_saved_after"]}
        for run in read_json("quality", [])
        if run["kind"] in kinds and (run["dataset"]["name"], run["device"]) == here
        and not has_whole_cnns(run)
    ]  # fmt: skip


def measure_time_to_accuracy(quick: bool) -> dict:
    """Seconds from the start of the process to a saved Stage 1 of so much test accuracy.

    A training is as good as its schedule's end: so a low level is reached sooner by a short training. The long ones
    are those of quality.py's runs: they are not trained a second time.
    """
    seeds = (0,) if quick else (0, 1, 2)
    short = [in_fresh_process(_short_training, seed, quick, time.time()) for seed in seeds]
    return {"light": quick, "trainings": short + _whole_runs("light" if quick else "full")}


def _cost_of_images(count: int, policy: str) -> tuple[float, float]:
    """Training images/s of a whole epoch, when all is traced, and peak memory in GB, with `count` train images."""
    import mscnn_helpers as mscnn

    recipe = mscnn.Recipe(2, BATCH, small_crops=0.0)
    seconds = mscnn.train_classifier(our_network(policy), random_data(count), recipe)["seconds"]
    return count / seconds[1], peak_memory_gb()


def _cost_of_categories(count: int, policy: str) -> tuple[float, float]:
    """Seconds to train one Stage 2 CNN of `count`, and peak memory in GB.

    It is the second one, when all is traced, and its share of what is done once for all.
    """
    import mscnn_helpers as mscnn

    data = random_data(5000, count)
    model = mscnn.MultiStageCNN.for_dataset(data, policy)
    begun = time.perf_counter()
    trainer = mscnn.Stage2Trainer(model, data, mscnn.Recipe(20, 256))
    share = (time.perf_counter() - begun) / count
    trainer.predicted = data.calibration.labels  # each category verifiers its share, as with a trained Stage 1
    trainer.train(0, model.stage2_base, 0)
    start = time.perf_counter()
    trainer.train(1, model.stage2_base, 0)
    return share + time.perf_counter() - start, peak_memory_gb()


def measure_growth(quick: bool) -> dict:
    """How cost grows with the number of train images and of categories; every number in turn, in a fresh process."""
    import mscnn_helpers as mscnn

    results = {
        "policy": mscnn.fastest_policy(),
        "images": {n: [] for n in ((1000,) if quick else (5000, 10000, 25000, 50000))},
        "categories": {n: [] for n in ((2, 10) if quick else (2, 5, 10, 20, 50))},
    }
    for _ in range(1 if quick else 5):
        for kind, cost in (("images", _cost_of_images), ("categories", _cost_of_categories)):
            for number, costs in results[kind].items():
                costs.append(in_fresh_process(cost, number, results["policy"]))
    return results


def _on_shuffled_labels(seed: int, epochs: int) -> float:
    """Test accuracy of a Stage 1 whose train and calibration labels say nothing of their images."""
    import mscnn_helpers as mscnn

    data, random = mscnn.load_dataset(DATASET, light_mode=True, seed=seed), np.random.default_rng(seed)
    shuffled = {
        name: mscnn.Split(split.images, random.permutation(split.labels))
        for name, split in (("train", data.train), ("calibration", data.calibration))
    }
    data = dataclasses.replace(data, **shuffled)
    model = mscnn.MultiStageCNN.for_dataset(data, seed=seed)
    mscnn.train_stage1(model, data, mscnn.default_recipe(len(data.train), epochs), seed)
    return float((model.stage1_logits(data.test.images).argmax(axis=1) == data.test.labels).mean())


def measure_control(quick: bool) -> dict:
    """Stage 1 trained on shuffled labels: its test accuracy has to be chance.

    Several shuffles, since like images get one answer: so one shuffle's accuracy varies more than images drawn one by
    one would.
    """
    seeds, epochs = (range(2), 1) if quick else (range(6), 5)
    return {"accuracies": [_on_shuffled_labels(seed, epochs) for seed in seeds]}


MEASURES: dict[str, Callable[[bool], dict]] = {
    "training": measure_training, "decide": measure_decide, "branches": measure_branches,
    "cold_start": measure_cold_start, "time_to_accuracy": measure_time_to_accuracy, "growth": measure_growth,
    "control": measure_control,
}  # fmt: skip


# ---- RESULTS.md


def table_training(results: dict) -> list[str]:
    rates = results["images_per_second"]
    rows = [
        [name, spread(values, "{:,.0f}"), spread([a / b for a, b in zip(rates["ours"], values, strict=True)], "{:.2f}")]
        for name, values in rates.items()
    ]
    gflops = spread(results["convolutions_gflops"], "{:,.0f}")
    share = spread(results["share_of_convolutions"], "{:.0%}")
    in_float32 = spread(results["float32_over_stock"], "{:.2f}")
    return [
        f"Stage 1, batches of {BATCH}, ours in {results['policy']}. Its convolutions alone, forward and backward,",
        f"reach {gflops} GFLOP/s here; ours trains at {share} of that. In",
        f"float32, ours is {in_float32} times as fast as plain Keras. Stock layers and PyTorch",
        f"({results['torch']}) train the same network without augmentation and by plain SGD, which is in their favour.",
        "All are timed from the beginning of an epoch's first step to the end of its last: what `fit` does around an",
        "epoch counts in none.", "",
        *markdown(["training of Stage 1", "images/s", "ours, times as fast"], rows),
    ]  # fmt: skip


def table_decide(results: dict) -> list[str]:
    rows = [
        [name, spread(one["stage1_per_second"], "{:,.0f}"), spread(one["decide_per_second"], "{:,.0f}"),
         spread(one["ratio_of_times"], "{:.2f}"), f"{one['ratio_of_multiply_adds']:.2f}"]
        for name, one in results.items()
    ]  # fmt: skip
    return markdown(["decide()", "Stage 1 alone, images/s", "decide(), images/s", "times the time",
                     "times the multiply-adds"], rows)  # fmt: skip


def table_branches(results: dict) -> list[str]:
    rows = []
    for blocks, one in results.items():
        single, many = one["ratio_of_times"]["1"], one["ratio_of_times"]["512"]
        costs = [f"{seconds:.0f} s, {megabytes:.1f} MB" for seconds, megabytes in one["costs"].values()]
        by_work = [ratio / one["ratio_of_multiply_adds"] for ratio in many]
        rows.append([blocks, spread(single, "{:.2f}"), spread(by_work, "{:.2f}"), *costs])
    header = [f"training of {n} Stage 2 CNNs, model file" for n in next(iter(results.values()))["costs"]]
    return [
        "decide() by two views against Stage 1 on one view: seconds on one image; seconds by multiply-adds on 512.",
        "Trainings are on random images.", "",
        *markdown(["blocks shared", "decide(), one image", "decide(), 512 images", *header], rows),
    ]  # fmt: skip


def table_cold_start(results: dict) -> list[str]:
    rows = [[name, spread(seconds, "{:.2f}")] for name, seconds in results.items()]
    return markdown(["cold start", "seconds"], rows)


def seconds_to(level: float, runs: list[dict]) -> float | None:
    """Seconds until the first saved Stage 1 of at least that test accuracy; None: there is none."""
    return min((run["saved_after"] for run in runs if run["accuracy"] >= level), default=None)


def table_time_to_accuracy(results: dict) -> list[str]:
    trainings = sorted(results["trainings"], key=lambda one: (one["seed"], one["epochs"]))
    rows = [
        [str(one["seed"]), str(one["epochs"]), f"{one['accuracy']:.2%}", f"{one['saved_after']:.0f}"]
        for one in trainings
    ]
    levels = []
    for seed in sorted({one["seed"] for one in trainings}):
        mine = [one for one in trainings if one["seed"] == seed]
        absent = "not reached" if len(mine) > 1 else "not measured"  # the whole run is still to come
        reached = [seconds_to(level, mine) for level in LEVELS]
        levels.append([str(seed), *(absent if s is None else f"{s:.0f}" for s in reached)])
    return [
        f"The default Stage 1 on {DATASET}{', light mode' * results['light']}; seconds from the start of the process.",
        f"The trainings of more than {SHORT} epochs are those of the runs under Quality.", "",
        *markdown(["seed", "epochs", "accuracy as saved, test", "seconds until saved"], rows),
        *markdown(["seed", *(f"seconds to {level:.0%}" for level in LEVELS)], levels),
    ]  # fmt: skip


def table_growth(results: dict) -> list[str]:
    def rows(kind: str, form: str) -> list[list[str]]:
        base = results[kind].get("10", next(iter(results[kind].values())))
        return [
            [f"{int(number):,}", spread([cost for cost, _ in costs], form),
             spread([cost / other for (cost, _), (other, _) in zip(costs, base, strict=True)], "{:.2f}"),
             spread([memory for _, memory in costs], "{:.2f}")]
            for number, costs in results[kind].items()
        ]  # fmt: skip

    images = ["train images", "images/s", "against the fewest", "peak memory, GB"]
    categories = ["categories", "seconds for one Stage 2 CNN", "against 10 categories", "peak memory, GB"]
    return [
        f"In {results['policy']}. Images/s are those of a whole epoch, with validation on 500 images. A Stage 2 CNN is",
        "validated on its category's share of 500 images: a larger one where categories are few.", "",
        *markdown(images, rows("images", "{:,.0f}")), *markdown(categories, rows("categories", "{:.1f}")),
    ]  # fmt: skip


def table_control(results: dict) -> list[str]:
    mean, deviation = statistics.mean(results["accuracies"]), statistics.stdev(results["accuracies"])
    error = deviation / len(results["accuracies"]) ** 0.5  # standard error of the mean
    verdict = "as it should be" if abs(mean - 0.1) < 3 * max(error, 0.005) else "WRONG: labels leak"
    return [
        f"Trained on shuffled labels (CIFAR-10, light mode, {len(results['accuracies'])} shuffles) Stage 1 has",
        f"{spread(results['accuracies'], '{:.1%}')} on the test split, on average {mean:.1%} ± {error:.1%} (standard",
        f"error); chance is 10.0%: {verdict}.", "",
    ]  # fmt: skip


TABLES: dict[str, Callable[[dict], list[str]]] = {
    "training": table_training, "decide": table_decide, "branches": table_branches,
    "cold_start": table_cold_start, "time_to_accuracy": table_time_to_accuracy, "growth": table_growth,
    "control": table_control,
}  # fmt: skip


def section(figures: dict) -> str:
    """The section of RESULTS.md."""
    lines = [
        "## Speed", "",
        "Written by `python benchmarks/speed.py`. Medians, in brackets minimum and maximum; without brackets it is one",
        "measurement.", "",
    ]  # fmt: skip
    for name, one in figures.items():
        lines += [f"### {name.replace('_', ' ').capitalize()}", "", *TABLES[name](one["results"])]
        lines += [origin_line(one), ""]
    return "\n".join(lines)


def main() -> None:
    """Measures, and replaces what was measured before under the same name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter repeats; replaces no full figures")
    parser.add_argument("--only", default="", help=f"comma-separated: {', '.join(MEASURES)}")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else list(MEASURES)
    unknown = sorted(set(wanted) - set(MEASURES))
    if unknown:
        parser.error(f"unknown measurement {', '.join(unknown)}: choose among {', '.join(MEASURES)}")
    sys.path.insert(0, str(ROOT))
    import mscnn_helpers as mscnn

    if mscnn.tf.config.list_physical_devices("GPU"):
        parser.error("on a GPU these times would not wait for the device: hide it with CUDA_VISIBLE_DEVICES=-1")
    figures = read_json("speed", {})
    for name in wanted:
        print(name, flush=True)
        command = f"python benchmarks/speed.py --only {name}" + " --quick" * options.quick
        one = {**origin(command), "results": MEASURES[name](options.quick)}
        one = json.loads(json.dumps(one))  # as it will be read: keys are text
        print("\n".join(TABLES[name](one["results"])), flush=True)
        if not (options.quick and name in figures and not figures[name]["command"].endswith("--quick")):
            merged = {**figures, name: one}
            figures = {key: merged[key] for key in MEASURES if key in merged}
            write("speed", figures, section(figures))
            targets.main()


if __name__ == "__main__":
    main()
