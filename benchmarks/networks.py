"""Measures Stage 1's networks on several data sets: accuracy, ranking, size and time of both stages.

    python benchmarks/networks.py --row "TrashNet, efficientnet_lite0"     one row, seed 0; --seed 1 for another
    python benchmarks/networks.py --quick                                 a small slice: shows that it works
    python benchmarks/networks.py --photographs            how many photographs are enough: a curve for notebook 06
    python benchmarks/networks.py --recipes                        optimizers for vgg, on a part of the train images
    python benchmarks/networks.py --tables                                the tables anew, from networks.json

A row that is measured again replaces its figures of that seed, and of all seeds if the row has been changed since; the
other rows stay, so that the table can be filled row by row. A seed decides splits and training. The test split is
looked at once, after the training. TrashNet is looked for as a folder `trashnet`, EuroSAT as `eurosat.npz`, both in
MSCNN_DATA_DIR.
"""

import argparse
import dataclasses
import itertools
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from common import ROOT, markdown, origin, read_json, replace, spread, write
from speed import multiply_adds

import mscnn_helpers as mscnn
from mscnn_parts import transfer
from mscnn_parts.downloads import data_folder


class Row(NamedTuple):
    """What is trained on what; epochs 0 is the default recipe."""

    dataset: str
    network: str
    image_size: int
    epochs: int = 0
    light_mode: bool = False
    target: float = 0.0  # accuracy by a single view or, where mirrored images keep their category, by two
    quarter_turns: bool = False
    stage2_branch: int = -1
    in_steps: bool = False  # Stage 1 by `train_in_steps`


ROWS = {
    "TrashNet, efficientnet_lite0": Row("trashnet", "efficientnet_lite0", 160, 12, target=0.94, quarter_turns=True),
    "TrashNet, efficientnet_b0": Row("trashnet", "efficientnet_b0", 224, 12, quarter_turns=True),
    "TrashNet, resnet50": Row("trashnet", "resnet50", 224, 12, quarter_turns=True),
    "TrashNet, densenet121": Row("trashnet", "densenet121", 224, 12, quarter_turns=True),
    "TrashNet, compact": Row("trashnet", "compact", 96, 40, target=0.86, quarter_turns=True),
    "STL-10, efficientnet_lite0": Row("stl10", "efficientnet_lite0", 160),
    "EuroSAT, compact": Row("eurosat.npz", "compact", 64, 10, target=0.975, quarter_turns=True),
    "EuroSAT light mode, alexnet": Row("eurosat.npz", "alexnet", 64, 20, True),
    "EuroSAT light mode, resnet": Row("eurosat.npz", "resnet", 64, 20, True),
    "CIFAR-10 light mode, efficientnet_lite0": Row("cifar10", "efficientnet_lite0", 128, 6, True, target=0.88),
    "CIFAR-10, efficientnet_lite0": Row("cifar10", "efficientnet_lite0", 128, target=0.95),
    "CIFAR-10, vgg": Row("cifar10", "vgg", 32, target=0.93),
    "CIFAR-10, vgg by SGD in steps": Row("cifar10", "vgg", 32, 50, target=0.93, in_steps=True),
    "CIFAR-10, resnet": Row("cifar10", "resnet", 32, target=0.935),
    "CIFAR-10, classic": Row("cifar10", "classic", 32, 10, target=0.80),
    "MNIST, mnist": Row("mnist", "mnist", 28, 10),
    "MNIST, mnist_bn": Row("mnist", "mnist_bn", 28, 10, target=0.992),
}
MISSED = {  # a row's name -> what was aimed at and why it was not reached
    "TrashNet, efficientnet_lite0": "94 %, and an AURC 15 % below softmax, each reached with one seed of three. Some "
    "30 of the 430 test images are answered incorrectly: one seed's accuracy strays by 1.2 points, and its gain is "
    "mostly chance, as its range says. 500 of 2,091 train images are set aside to calibrate and to certify; whether "
    "that costs the accuracy is not known.",
    "EuroSAT, compact": "15 minutes, with AMX, 45 without: this machine has none, and other work ran beside it.",
    "EuroSAT light mode, resnet": "neither it nor alexnet is correct on 90 % after 20 epochs: 1,660 images are few for "
    "networks with random weights.",
}
RECIPES = {  # of `vgg`; Muon is the default
    "SGD": {"optimizer": "sgd", "optimizer_decay": 5e-4},
    "SGD, weight decay 5e-3": {"optimizer": "sgd", "optimizer_decay": 5e-3},
    "Muon": {"optimizer": "muon"},
}
PHOTOGRAPHS = (10, 20, 50, 100)  # per category; the last is as many as all categories have, if that is less
QUICK = Row("digits", "mnist", 28, 2, True, in_steps=True)
TRAININGS = {"stage1": mscnn.train_stage1, "stage2_base": mscnn.train_stage2_base, "stage2": mscnn.train_stage2}


def measure(row: Row, seed: int) -> dict:
    """Trains both stages and measures them on the test split, once."""
    own = data_folder() / row.dataset
    name = own if own.exists() else row.dataset
    data = mscnn.load_dataset(name, row.light_mode, seed, row.image_size, quarter_turns=row.quarter_turns)
    model = mscnn.MultiStageCNN.for_dataset(data, seed=seed, network=row.network, stage2_branch=row.stage2_branch)
    recipe, minutes, histories = mscnn.default_recipe(len(data.train), row.epochs, 0, row.network), {}, {}
    trainings = {**TRAININGS, "stage1": train_in_steps} if row.in_steps else TRAININGS
    for name, train in trainings.items():
        begun = time.perf_counter()
        histories[name] = train(model, data, recipe, seed)
        minutes[name] = (time.perf_counter() - begun) / 60
    model.calibrate(data.calibration)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        size = path.stat().st_size / 1e6
    return {
        **tested(model, data), "policy": model.policy, "minutes": minutes, "MB": size,
        "parameters": model.stage1.count_params(), "multiply_adds": multiply_adds(model.stage1),
        "val_accuracy": histories["stage1"]["val_accuracy"], "images": [len(data.train), len(data.test)],
    }  # fmt: skip


def train_in_steps(
    model: mscnn.MultiStageCNN, data: mscnn.Dataset, recipe: mscnn.Recipe, seed: int
) -> dict[str, list[float]]:
    """Trains Stage 1 as courses do: SGD at 0.1, a tenth of that after half and again after four fifths of the epochs.

    Weight decay 5e-4 is meant to go through the momentum, as PyTorch has it. In Keras it passes by, so the same takes
    1 / (1 - momentum) times as much.
    """
    epoch = -(-len(data.train) // recipe.batch_size)
    falls = [epoch * (recipe.epochs // 2), epoch * (recipe.epochs * 4 // 5)]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(falls, [0.1, 0.01, 0.001])
    optimizer = keras.optimizers.SGD(schedule, 0.9, weight_decay=5e-3)
    plain = dataclasses.replace(recipe, label_smoothing=0.0)
    history = mscnn.train_classifier(model.stage1, data, plain, seed, optimizer=optimizer)
    model.reset_calibration()
    mscnn.fit_ood(model, data)
    return history


def tested(model: mscnn.MultiStageCNN, data: mscnn.Dataset) -> dict:
    """Accuracy, ranking and speed on the test split, and what is rejected as out of distribution."""
    model.decide(data.test.images[:512])  # traces the graphs
    begun = time.perf_counter()
    decisions = model.decide(data.test.images)
    seconds = time.perf_counter() - begun
    metrics = mscnn.evaluate(decisions, data.test.labels, 0.7)
    correct = decisions.stage1_category == data.test.labels
    foreign = mscnn.synthetic_ood_images(data.test.images[:200])
    foreign = {kind: foreign[kind] for kind in ("uniform noise", "one color", "stripes")}
    foreign["photographs"] = mscnn.foreign_photographs(data.input_shape)
    other = len(data.category_names)
    return {
        "accuracy": metrics["stage1"]["accuracy"], "accuracy_of_answers": float(correct.mean()),
        "aurc_softmax": metrics["stage1"]["aurc"], "aurc": metrics["two_stage"]["aurc"],
        "coverage": metrics["two_stage"]["coverage"],
        "selective_accuracy": metrics["two_stage"]["selective_accuracy"],
        "in_distribution_rejected": float((~decisions.in_distribution).mean()),
        "foreign_rejected": {k: float((model.decide(v).category == other).mean()) for k, v in foreign.items()},
        "images_per_second": len(data.test) / seconds,
    }  # fmt: skip


def table(figures: dict) -> str:
    """The section of RESULTS.md; `figures`: a row's name -> a seed -> what `measure` and `origin` say."""
    rows = [cells(name, figures.get(name, {})) for name in ROWS]
    origins = [
        f"- {name}, seed {seed}: commit {one['commit']}, {one['device']}{policy_of(one) and f', {policy_of(one)}'}"
        for name in ROWS for seed, one in figures.get(name, {}).items()
    ]  # fmt: skip
    missed = [f"- {name}: {why}" for name, why in MISSED.items() if name in figures]
    return "\n".join([
        "## Networks", "",
        "Stage 1's networks, each trained by its own recipe, with its Stage 2. Test split; of several seeds median",
        "(minimum to maximum). *AURC below softmax*: how much smaller the two stages' AURC is than that of Stage 1's",
        "softmax on a single view; *turned*: trained with `quarter_turns`; *whole CNNs*: with `--stage2_branch 0`, the",
        "default of that time; *to 90 %*: epochs of Stage 1, those of its last layer alone included (20, on frozen",
        "features: seconds), until it is correct on 90 % of the calibration split. Data and weights of some rows could",
        "not be downloaded where these figures were made.", "",
        *markdown(HEADER, rows), *deep_against_shallow(figures), accepted_strangers(figures), "",
        "Aimed at and missed:", "", *missed, "", *origins,
    ])  # fmt: skip


HEADER = [
    "data, network", "seeds", "pixels", "accuracy, a single view", "of the answers", "target", "AURC of softmax",
    "of two stages", "AURC below softmax", "coverage and selective accuracy at 0.7", "parameters, multiply-adds",
    "model file", "training, decide()", "epochs", "to 90 %",
]  # fmt: skip


def policy_of(one: dict) -> str:
    """The dtype policy of a measurement; of the older ones that of `compact` is not known, the others had float32."""
    return one.get("policy", "" if one["row"]["network"] == "compact" else "float32")


def cells(name: str, seeds: dict) -> list[str]:
    """A row of the table."""
    row = Row(**next(iter(seeds.values()))["row"]) if seeds else ROWS[name]
    epochs = f"{row.epochs or 'default'}{', turned' * row.quarter_turns}{', whole CNNs' * (row.stage2_branch == 0)}"
    if not seeds:
        command = f'`python benchmarks/networks.py --row "{name}"`'
        return [name, "", f"{row.image_size}", "not measured here:", command, *[""] * 8, epochs, ""]
    each = list(seeds.values())

    def column(key: str, form: str) -> str:
        return spread([one[key] for one in each], form)

    below = spread([1 - one["aurc"] / one["aurc_softmax"] for one in each], "{:.0%}")
    minutes = np.median([sum(one["minutes"].values()) for one in each])
    return [
        name, ", ".join(seeds), f"{row.image_size}", column("accuracy", "{:.1%}"),
        column("accuracy_of_answers", "{:.1%}"), f"{ROWS[name].target:.1%}" if ROWS[name].target else "",
        column("aurc_softmax", "{:.5f}"), column("aurc", "{:.5f}"), below,
        f"{column('coverage', '{:.1%}')}, {column('selective_accuracy', '{:.1%}')}",
        f"{each[0]['parameters'] / 1e6:.1f} M, {each[0]['multiply_adds'] / 1e6:.0f} M", f"{each[0]['MB']:.0f} MB",
        f"{minutes:.0f} min, {np.median([one['images_per_second'] for one in each]):.0f}/s",
        epochs, ", ".join(map(epochs_to_90, each)),
    ]  # fmt: skip


def epochs_to_90(one: dict) -> str:
    reached = np.flatnonzero(np.array(one["val_accuracy"]) >= 0.9)
    return str(reached[0] + 1) if reached.size else "not reached"


def write_tables(figures: dict) -> None:
    """Writes networks.json, its section of RESULTS.md, and what docs/networks.md shows of it, between its marks."""
    write("networks", figures, table(figures))
    path = ROOT / "docs" / "networks.md"
    before, mark, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    replace(path, f"{before}{mark}\n{documented(figures)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


MARKS = ("<!-- networks -->", "<!-- /networks -->")


def documented(figures: dict) -> str:
    """The measured rows with the columns that help to choose."""
    shown = ("data, network", "seeds", "pixels", "accuracy, a single view", "of the answers", "AURC below softmax",
             "training, decide()", "epochs")  # fmt: skip
    chosen = [HEADER.index(one) for one in shown]
    rows = [cells(name, figures[name]) for name in ROWS if name in figures]
    return "\n".join(markdown([*shown], [[row[i] for i in chosen] for row in rows])).strip()


def deep_against_shallow(figures: dict) -> list[str]:
    """A line on `resnet` against `alexnet`, seed by seed; none before both have been measured."""
    deep, shallow = (figures.get(f"EuroSAT light mode, {name}", {}) for name in ("resnet", "alexnet"))
    points = [100 * (deep[seed]["accuracy"] - shallow[seed]["accuracy"]) for seed in deep if seed in shallow]
    if not points:
        return []
    gained = spread(points, "{:+.1f}")
    return [f"EuroSAT in light mode: `resnet` is {gained} points ahead of `alexnet`, seed by seed; aimed at: +4.0.", ""]


def accepted_strangers(figures: dict) -> str:
    """A sentence on images of no category that became OTHER less often than in 95 % of the cases."""
    shares = [
        f"{share:.0%} of {kind} ({name}, seed {seed})"
        for name, seeds in figures.items() for seed, one in seeds.items()
        for kind, share in one["foreign_rejected"].items() if share < 0.95
    ]  # fmt: skip
    return (
        "Of 200 images each of uniform noise, one color and stripes, and of two foreign photographs, all kinds became "
        f"OTHER in 95 % or more, except: {', '.join(shares) or 'none'}."
    )


def learning_curve(seed: int) -> dict[str, float]:
    """Test accuracy of a head on frozen features of efficientnet_lite0, by the train photographs per category."""
    row = ROWS["TrashNet, efficientnet_lite0"]
    data = mscnn.load_dataset(data_folder() / row.dataset, row.light_mode, seed, row.image_size)
    trunk = mscnn.MultiStageCNN.for_dataset(data, seed=seed, network=row.network).trunk
    head_alone = mscnn.phase_recipes(mscnn.default_recipe(len(data.train), network=row.network))[0]
    features, rng = transfer.trunk_features(trunk, data, seed=seed), np.random.default_rng(seed)
    by_view = np.asarray(features.train).reshape(features.views, len(data.train), -1)  # (views, N, K)
    seen, found = trunk.predict(data.test.images, batch_size=64, verbose=0), {}
    places = [rng.permutation(np.flatnonzero(data.train.labels == c)) for c in range(len(data.category_names))]
    for count in [*PHOTOGRAPHS[:-1], min(PHOTOGRAPHS[-1], *map(len, places))]:
        chosen = np.concatenate([some[:count] for some in places])
        inputs = keras.Input(seen.shape[1:])
        head = keras.Model(inputs, keras.layers.Dense(len(places))(inputs))
        few = dataclasses.replace(data, train=data.train.take(chosen))
        own = features._replace(train=by_view[:, chosen].reshape(-1, seen.shape[1]))
        transfer.train_head(head, own, few, head_alone, seed)
        answers = head.predict(seen, verbose=0).argmax(axis=1)
        found[str(count)] = float((answers == data.test.labels).mean())
    return found


def photographs_section(figures: dict) -> str:
    """The section of RESULTS.md on the learning curve; `figures`: a seed -> what `learning_curve` and `origin` say."""
    each = [one["accuracy"] for one in figures.values()]
    rows = [[count, spread([one[count] for one in each], "{:.1%}")] for count in each[0]]
    return "\n".join([
        "## How many photographs", "",
        "Written by `python benchmarks/networks.py --photographs` for notebook 06: a head on the frozen features of",
        "efficientnet_lite0, 160 pixels, by the train photographs of TrashNet per category. Test split, median",
        f"(minimum to maximum) over the seeds {', '.join(figures)}.", "",
        *markdown(["photographs per category", "accuracy"], rows),
        *origins_of(figures),
    ])  # fmt: skip


def tried_recipes(seed: int) -> dict[str, float]:
    """Calibration accuracy of `vgg` after 6 epochs on 10,000 of CIFAR-10's train images, by each of RECIPES."""
    data = mscnn.load_dataset("cifar10", seed=seed)
    recipe = mscnn.default_recipe(len(data.train), 6, network="vgg")
    few, found = dataclasses.replace(data, train=data.train.take(np.arange(10_000))), {}
    for name, changes in RECIPES.items():
        network = mscnn.MultiStageCNN.for_dataset(few, seed=seed, network="vgg").stage1
        history = mscnn.train_classifier(network, few, dataclasses.replace(recipe, **changes), seed)
        found[name] = history["val_accuracy"][-1]
    return found


def recipes_section(figures: dict) -> str:
    """The section of RESULTS.md on optimizers; `figures`: a seed -> what `tried_recipes` and `origin` say."""
    each = [one["accuracy"] for one in figures.values()]
    rows = [
        [name, spread([one[name] for one in each], "{:.1%}"),
         spread([100 * (one[name] - one["SGD"]) for one in each], "{:+.1f}")]
        for name in each[0]
    ]  # fmt: skip
    return "\n".join([
        "## Optimizers of vgg", "",
        "Written by `python benchmarks/networks.py --recipes`: 6 epochs on 10,000 of CIFAR-10's train images in",
        "batches of 128. Calibration split, 2,500 images, after the last epoch; median (minimum to maximum)",
        f"over the seeds {', '.join(figures)}, differences seed by seed.", "",
        *markdown(["optimizer", "accuracy", "against SGD, points"], rows), *origins_of(figures),
    ])  # fmt: skip


def origins_of(figures: dict) -> list[str]:
    return [f"- seed {seed}: commit {one['commit']}, {one['device']}" for seed, one in figures.items()]


IN_THREE_SEEDS = {"photographs": (learning_curve, photographs_section), "recipes": (tried_recipes, recipes_section)}


def main() -> None:
    """Measures a row and writes networks.json and its section of RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small slice; writes nothing")
    parser.add_argument("--row", choices=ROWS, action="append", default=[], help="which row; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the splits and of the training")
    parser.add_argument("--photographs", action="store_true", help="the curve for notebook 06, seeds 0, 1 and 2")
    parser.add_argument("--recipes", action="store_true", help="optimizers for vgg, seeds 0, 1 and 2")
    parser.add_argument("--tables", action="store_true", help="train nothing")
    options = parser.parse_args()
    figures = read_json("networks", {})
    if options.quick:
        print(measure(QUICK, options.seed))
        return
    for name in options.row:
        made = origin(f'python benchmarks/networks.py --row "{name}" --seed {options.seed}')
        seeds = figures.get(name, {})
        measured = {**made, "row": ROWS[name]._asdict(), **measure(ROWS[name], options.seed)}
        # Seeds of another row, of other epochs for example, or of another precision would not be comparable.
        now = (ROWS[name]._replace(target=0), measured["policy"])
        same = [(Row(**one["row"])._replace(target=0), policy_of(one)) == now for one in seeds.values()]
        others = dict(itertools.compress(seeds.items(), same))
        figures[name] = {**others, str(options.seed): measured}
        write_tables(figures)
    for name, (measured_by, section) in IN_THREE_SEEDS.items():
        for seed in (0, 1, 2) if getattr(options, name) else ():
            made = origin(f"python benchmarks/networks.py --{name}")
            all_seeds = read_json(name, {}) | {str(seed): {**made, "accuracy": measured_by(seed)}}
            write(name, all_seeds, section(all_seeds))
    if options.tables:
        write_tables(figures)
    print(table(figures))


if __name__ == "__main__":
    main()
