"""The benchmarks: the same network for every baseline, honest repeats, and tables that show what was measured."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import time

import ablations
import common
import craft
import keras
import networks
import numpy as np
import ood
import pytest
import quality
import selective
import speed
import targets
import verifiers
from conftest import ROOT, patch_rooms

import mscnn_helpers as mscnn
from mscnn_parts.networks import STAGE1_WIDTHS, STAGE2_WIDTHS


def test_each_round_has_every_task_in_an_order_of_its_own_and_the_first_does_not_count():
    called = []
    seconds = common.interleaved({name: lambda name=name: called.append(name) for name in "abcd"}, repeats=9)
    rounds = ["".join(called[i : i + 4]) for i in range(0, 40, 4)]
    assert [sorted(one) for one in rounds] == [list("abcd")] * 10
    before_b = {one[one.index("b") - 1] for one in rounds if one[0] != "b"}
    assert before_b == set("acd"), "no task always follows the same one"
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abcd", 9)
    assert min(min(values) for values in seconds.values()) > 0


def test_a_task_may_time_itself():
    assert common.interleaved({"own": lambda: common.Timed(42)}, repeats=2) == {"own": [42.0, 42.0]}


def test_a_timed_epoch_of_fit_is_that_of_its_steps(monkeypatch):
    network, waiting = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), []
    network.compile("sgd", "mse")

    def slow_end(fit):
        def fit_and_wait(*arguments, **named):
            fit(*arguments, **named)
            waiting.append(time.sleep(0.5))

        return fit_and_wait

    monkeypatch.setattr(network, "fit", slow_end(network.fit))
    task = speed.timed_fit(network, np.zeros((8, 2), np.float32), y=np.zeros(8, np.float32), batch_size=2)
    task()
    assert 0 < task() < 0.5 and len(waiting) == 2


@pytest.mark.parametrize(
    ("values", "told"), [([2.0], "2.0"), ([1.0, 9.0, 2.0], "2.0 (1.0 to 9.0)"), ([1.0, 2.0], "1.5 (1.0 to 2.0)")]
)
def test_spread_is_the_median_with_both_ends(values, told):
    assert common.spread(values, "{:.1f}") == told


def test_each_benchmark_has_its_section_and_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "HERE", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    common.write("speed", {"a": 1}, "## Speed\n\nold")
    common.write("quality", [1], "## Quality\n\nsome")
    common.write("speed", {"a": 2}, "## Speed\n\nnew\n")
    text = (tmp_path / "RESULTS.md").read_text("utf-8")
    assert text.count("## Speed") == 1 and "old" not in text
    assert text.index("## Quality") < text.index("## Speed") < text.index("new")
    assert common.read_json("speed", None) == {"a": 2} and common.read_json("absent", "none") == "none"


def test_results_are_made_from_the_figures():
    """RESULTS.md is what the committed figures give, word for word."""
    text = common.RESULTS.read_text("utf-8")
    sections = {
        "quality": quality.table, "speed": speed.section, "ablations": ablations.table,
        "selective": selective.table, "ood": ood.table, "verifiers": verifiers.table,
        "branches": functools.partial(verifiers.table, branches=True), "networks": networks.table,
        "craft": craft.section, "photographs": networks.photographs_section,
        "recipes": networks.recipes_section,
    }  # fmt: skip
    for name, make in sections.items():
        figures = common.read_json(name, None)
        assert figures is None or make(figures).strip() in text
    assert "## Quality" in text
    assert networks.documented(common.read_json("networks", {})) in (ROOT / "docs" / "networks.md").read_text("utf-8")
    assert targets.table(targets.read_measured()).strip() in text


def test_a_row_of_craft_is_compared_with_the_base_of_the_same_seed():
    def run(accuracy: float, aurc: float) -> dict:
        return {"accuracy": accuracy, "aurc": aurc, "train": {"rate": 0.06}}

    rows = {"the base": {"0": run(0.5, 0.2), "1": run(0.6, 0.1)}, "flip": {"1": run(0.63, 0.05), "2": run(0.9, 0.01)}}
    assert craft.row_line("flip", rows) == ["flip", "1", "0.06", "63.0%", "+3.0", "0.050", "-50%"]
    assert craft.row_line("mixup", rows) == []


def test_craft_measures_everything_once_and_its_ends_have_a_place():
    jobs, figures = craft.jobs(craft.FULL), {"rows": {}, "ensembles": {}, "measurements": {}}
    for kind, name, seed, _ in jobs:
        part, key = craft.place_of(figures, kind, name, seed)
        assert key not in part
        part[key] = {}
    assert set(figures["rows"]) == set(craft.ROWS) and set(figures["measurements"]) == set(craft.MEASUREMENTS)
    assert all(set(seeds) == {"0", "1", "2"} for seeds in [*figures["rows"].values(), figures["ensembles"]])


def test_the_table_of_craft_says_how_many_seeds_each_row_has():
    figures = common.read_json("craft", None)
    lines = [line.removeprefix("| ").split(" | ") for line in craft.section(figures).splitlines()]
    table = {line[0]: line[1] for line in lines if len(line) > 2}  # others have two columns
    for name, seeds in figures["rows"].items():
        assert table[name] == str(len(seeds.keys() & figures["rows"]["the base"].keys())), name
    for name in figures["ensembles"]["0"]["figures"]:
        assert table[name] == str(len(figures["ensembles"])), name


def test_craft_has_measured_everything_with_every_seed():
    figures, seeds = common.read_json("craft", None), {str(seed) for seed in craft.SEEDS}
    assert {name for name in craft.ROWS if figures["rows"].get(name, {}).keys() != seeds} == set()
    assert figures["ensembles"].keys() == seeds and figures["measurements"].keys() == craft.MEASUREMENTS.keys()


def test_shares_that_become_other():
    results = {"softmax": [1, 2, 3, 4], "confidence": [0.1, 0.8, 0.9, 0.95], "ood_score": [-1, 1, -1, 1]}
    results = {name: np.array(values) for name, values in results.items()}
    shares = ood.shares_of_other(results, {"softmax": 2}, threshold=0.9)
    assert shares == {"softmax": 0.25, "confidence": 0.5, "ours": 0.75, "out of distribution": 0.5}


def test_scores_are_higher_for_what_is_known(trained_model, tiny_data):
    train = selective.pooled_features(trained_model.stage1, tiny_data.train.images).mean(axis=0)
    noise = mscnn.synthetic_ood_images(tiny_data.test.images)["uniform noise"]
    weights = ood.fitted_weights(trained_model, tiny_data.calibration.images)
    known, strange = (ood.scores(trained_model, train, weights, images) for images in (tiny_data.test.images, noise))
    for name in ("neighbours", "ood_score"):
        assert np.median(known[name]) > np.median(strange[name]), name
    assert {name: one.shape for name, one in known.items()} == dict.fromkeys(strange, (100,))


def test_signs_are_weighted_by_how_well_they_tell_distorted_images(trained_model, tiny_data):
    images = tiny_data.calibration.images
    half = len(images) // 2
    made_up = np.concatenate([*ood.distorted_images(images[:half], images[half : 2 * half]).values()])
    weights = ood.fitted_weights(trained_model, images)
    known, strange = (
        ood.terms_of(trained_model, one, trained_model.decide(one))[:, :3] @ weights for one in (images, made_up)
    )
    assert weights.shape == (3,) and known.mean() < strange.mean()


def test_one_verifier_is_trained_on_the_draws_of_all_categories():
    labels, rng = np.arange(60) % 3, np.random.default_rng(0)
    draw = verifiers.mixed_draw(labels, rng.random((60, 3)), 200, rng)
    asked = draw.asked.argmax(axis=1)
    assert np.bincount(asked).tolist() == [200] * 3 and (draw.asked.sum(axis=1) == 1).all()
    np.testing.assert_array_equal(draw.correct == 1, labels[draw.indices] == asked)
    assert draw.correct.mean() == 0.5 and len(np.unique(asked[:50])) == 3, "in random order"


def test_the_verifier_is_asked_by_log_odds():
    logits, category = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32), np.arange(20) % 5
    got = verifiers.asked_log_odds(logits, np.eye(5, dtype=np.float32)[category])
    np.testing.assert_allclose(got, mscnn.log_odds(logits, category), rtol=1e-4, atol=1e-5)


@pytest.fixture
def trial(trained_model, tiny_data) -> verifiers.Trial:
    recipe = mscnn.Recipe(epochs=4, batch_size=32, stage2_base_epochs=4, stage2_fraction=0.6)
    return verifiers.Trial(trained_model, tiny_data, recipe, seed=0)


LEARNING = ["one shared verifier", "Stage 2 base network, longer", "Stage 1's features as input", "blends as negatives"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_a_verifier_is_learned(trial, tiny_data, name):
    """It tells correct answers from incorrect ones, and leaves Stage 1 and the Stage 2 base network as they are."""
    before = trial.model.fingerprints()
    images, labels = tiny_data.test.images, tiny_data.test.labels
    begun = verifiers.stage2_base(trial)(images, labels)
    odds = verifiers.SCORES[name](trial)
    correct, incorrect = odds(images, labels), odds(images, (labels + 1) % 5)
    assert correct.shape == (100,) and (correct[:, None] > incorrect).mean() > 0.8, "an AUROC"
    assert np.abs(correct - begun).mean() > 0.1, "it has gone on from where it began"
    after = trial.model.fingerprints()
    assert all(after[part] == before[part] for part in ("stage1", "stage2_base"))


def test_no_image_trains_and_judges(tiny_data, monkeypatch):
    patch_rooms(monkeypatch, "load_dataset", lambda *_, **__: tiny_data)
    data = verifiers.split_for(verifiers.Form((0,), 300, 100, 0, "tiny"), seed=0)
    train, unseen, calibration = (
        {one.tobytes() for one in split.images} for split in (data.train, data.test, data.calibration)
    )
    assert (len(train), len(unseen)) == (300, 100) and not train & unseen and not unseen & calibration
    test = {one.tobytes() for one in tiny_data.test.images}
    assert not test & (train | unseen | calibration), "the test split stays closed"


def test_what_was_asked_is_kept_for_the_same_model_only(tmp_path, monkeypatch):
    monkeypatch.setattr(verifiers, "ROOT", tmp_path)
    monkeypatch.setattr(selective, "in_fresh_process", lambda compute, *arguments: compute(*arguments))
    asked, form = [], verifiers.QUICK

    def compute(*arguments):
        asked.append(arguments)
        return {"odds": np.full(3, len(asked))}

    path = verifiers.base_path(form, 0)
    path.parent.mkdir(parents=True)
    path.write_text("a model")
    for expected in (1, 1):
        assert verifiers.kept(form, 0, "wider: 48/96/96", compute)["odds"].tolist() == [expected] * 3
    path.write_text("another model")
    assert verifiers.kept(form, 0, "wider: 48/96/96", compute)["odds"].tolist() == [2] * 3
    assert asked == [(form, 0)] * 2


def test_cross_fitted_probabilities_are_of_networks_that_have_not_seen_the_image(trial, monkeypatch):
    seen, asked = [], []
    patch_rooms(monkeypatch, "train_classifier", lambda network, data, *_: seen.append(data.train.images))

    def softmax(network, images):
        asked.append(images)
        return np.full((len(images), 5), 0.2)

    monkeypatch.setattr(verifiers, "softmax_of", softmax)
    monkeypatch.setattr(verifiers, "train_ten", lambda trial, probability: probability)
    probability = verifiers.negatives_by_cross_fitting(trial)
    assert (probability == 0.2).all() and len(seen) == len(asked) == 2
    for fitted, tested in zip(seen, asked, strict=True):
        assert len(fitted) + len(tested) == len(trial.data.train)
        assert not {one.tobytes() for one in fitted} & {one.tobytes() for one in tested}


def test_more_views_are_the_mean_over_shifted_images(trial, tiny_data):
    category = tiny_data.test.labels
    same = verifiers.ours(trial)(tiny_data.test.images, category)
    shifted = verifiers.shifted_views(trial)(tiny_data.test.images, category)
    assert np.corrcoef(same, shifted)[0, 1] > 0.9 and np.abs(same - shifted).max() > 1e-3
    flat = np.full((4, 32, 32, 3), 90, np.uint8)  # which looks the same from everywhere
    both = (make(trial)(flat, category[:4]) for make in (verifiers.ours, verifiers.shifted_views))
    np.testing.assert_allclose(*both, rtol=1e-5)


def first_and_second(rng: np.random.Generator, count: int = 4000) -> tuple[dict, dict]:
    """What `verifiers.fitted` reads: both splits, five categories, a verifier that knows something."""
    first, second = {}, {}
    for split in ("calibration", "unseen"):
        category, correct = rng.integers(0, 5, count), rng.uniform(size=count) < 0.9
        first |= {
            f"{split}_category": category, f"{split}_labels": np.where(correct, category, (category + 1) % 5),
            f"{split}_margin": rng.normal(2.0 * correct, 1), f"{split}_signs": rng.normal(size=(count, 3)),
        }  # fmt: skip
        second[split] = rng.normal(2.0 * correct, 1)
    return first, second


def test_decisions_differ_in_what_they_take_into_account():
    first, second = first_and_second(np.random.default_rng(0))
    correct = first["unseen_category"] == first["unseen_labels"]
    results = {"a row each": verifiers.fitted, **verifiers.DECISIONS}
    aurc = {name: mscnn.aurc(decide(first, second), correct) for name, decide in results.items()}
    assert aurc.pop("no verifier") > 1.5 * max(aurc.values())
    assert max(aurc.values()) < 1.1 * min(aurc.values()), "where categories are alike and the signs say nothing"


def test_the_table_of_judges_says_where_an_interval_leaves_0_out():
    same = {"aurc": [-0.02, 0.0, 0.02], "augrc": [-0.02, 0.0, 0.02]}
    figures = {
        "images": [30_000, 15_000], "seeds": [0, 1], "command": "c", "commit": "d", "device": "e", "versions": {},
        "methods": {name: [dict.fromkeys(("aurc", "auroc_failure", "fpr95"), value)] * 2
                    for name, value in {"ours": 0.2, "worse idea": 0.4, "better idea": 0.1, "same": 0.2}.items()},
        "differences": {measure: {"worse idea": [-0.6, -0.5, -0.4], "better idea": [0.5, 1.0, 1.5], "same": ends}
                        for measure, ends in same.items()},
    }  # fmt: skip
    rows = [line for line in verifiers.table(figures).splitlines() if line.startswith("| ")][-4:]
    assert [row.split("|")[1].strip() for row in rows] == ["better idea", "ours", "same", "worse idea"]
    assert [row.split("|")[-2].strip() for row in rows] == ["below 0", "", "", "above 0"]
    assert "-50.0% (-60.0% to -33.3%)" in rows[0] and "+100.0% (+66.7% to +150.0%)" in rows[3]


def full_run(accuracy: float, seconds: float, stage2_branch: int = -1) -> dict:
    run = {"kind": "full", "dataset": {"name": "cifar10"}, "stage1": {"accuracy": accuracy}, "minutes": 20.0}
    spent = {"seconds": {"03_stage2_training": 10 + seconds}, "training_seconds": {"stage1": 100.0}}
    return {**run, **spent, "peak_memory_gb": 2.4, "parameters": {"stage2_branch": stage2_branch}}


def test_a_target_is_reached_by_the_median():
    rates = {"ours": [8.0, 9.0], "stock Keras float32": [2.0, 3.0], "PyTorch float32": [4.0, 4.0],
             "PyTorch bfloat16": [8.0, 10.0]}  # fmt: skip
    case = {"ratio_of_times": {"512": [1.8, 1.7, 1.9], "1": [1.7]}, "ratio_of_multiply_adds": 1.2}
    case["costs"] = {"10": [30.0, 5.0], "100": [75.0, 44.0]}
    branches = {"0": {"costs": {"10": [100.0, 9.0]}}, "2": case}
    speed = {"training": {"results": {"images_per_second": rates}}, "branches": {"results": branches}}
    selective = {"differences": {"aurc": {"softmax": [-0.4, -0.3, -0.2], "stage2_base": [-0.2, -0.1, 0.1]}}}
    selective["promises"] = [{"certified coverage": 0.7, "worst calibration": 0.031}]
    selective["promises"] += [{"certified coverage": 0.5, "worst calibration": 0.02}] * 2
    of_seed = {"ours, with the OOD rejection": {"seeds": [{"aurc": 0.006}]}, "softmax": {"seeds": [{"aurc": 0.01}]}}
    selective["methods"] = {"ours": {"seeds": [{}]}, **of_seed}
    runs = [full_run(0.931, 20.0), full_run(0.929, 80.0), full_run(0.94, 70.0)]
    runs.append(full_run(0.5, 900.0, stage2_branch=0))  # is another row
    auroc = {
        kind: {"ood_score": 0.97, "softmax": 0.9, "softmax, 2 views": 0.92}
        for kind in ("CIFAR-100", "MNIST", "uniform noise")
    }
    models = [{"auroc": auroc | {"Gaussian noise": {"ood_score": value}}} for value in (0.99, 0.9, 0.96)]
    unknown = {"runs": {"models": models}}
    text = targets.table(targets.Measured(speed, runs, {"results": selective}, unknown))
    assert (
        "OOD score, less that by the softmax of a single view | at least +3.0% | +7.0% (+7.0% to +7.0%) | yes |" in text
    )
    assert "both kinds of noise, the less | at least 95.0% | 96.0% (90.0% to 97.0%) | yes" in text
    assert "the pretrained model: AUROC of CIFAR-100's images by OOD score | at least 90.5% | not measured |" in text
    assert "| Stage 1 training, times stock Keras' in float32 | at least 3.50 | 3.50 (3.00 to 4.00) | yes |" in text
    assert "times PyTorch's in its fastest mode | at least 1.00 | 0.95 (0.90 to 1.00) | no |" in text
    assert "| Stage 1 training, times a hand-written step's | at least 0.90 | not measured |  |" in text
    assert "times Stage 1's training | at most 0.75 | 0.80 (0.30 to 0.90) | no |" in text
    assert "512 images, times Stage 1's seconds by multiply-adds | at most 1.20 | 1.50 (1.42 to 1.58) | no |" in text
    assert "| decide() on one image, times Stage 1's seconds | at most 1.80 | 1.70 | yes |" in text
    assert "| training of ten verifiers, times that of ten whole CNNs | at most 0.33 | 0.30 | yes |" in text
    assert "| training of 100 verifiers, times that of ten | at most 2.0 | 2.5 | no |" in text
    assert "| model of 100 categories, MB of its file | at most 60 | 44 | yes |" in text
    assert "| full run, accuracy of Stage 1 by one view | at least 93.00% | 93.10% (92.90% to 94.00%) | yes |" in text
    assert "| light run, accuracy of Stage 1 by one view | at least 68.0% | not measured |  |" in text
    assert "| AURC, times that of Stage 1's softmax | at most 0.750 | 0.700 (0.600 to 0.800) | yes |" in text
    assert "Stage 2 base network as verifier | at most 1.000 | 0.900 (0.800 to 1.100) | no |" in text
    assert "| coverage certified for 1 % errors | at least 65.0% | 50.0% (50.0% to 70.0%) | no |" in text
    assert "worst predicted category | at most 3.00%, each | 2.00% (2.00% to 3.10%) | no |" in text
    assert "OOD rejection, times that of Stage 1's softmax | at most 0.750 | 0.600 | yes |" in text
    assert "| FPR at 95 % TPR | at most 30.0% | not measured |  |" in text


def test_every_target_names_a_figure_that_the_benchmarks_have():
    lines = [line for line in targets.table(targets.read_measured()).splitlines() if "not measured" in line]
    five_seeds = common.read_json("selective", {"command": ""})["command"] == "python benchmarks/selective.py"
    assert all("deep ensemble" in line and not five_seeds for line in lines), "larger ensembles need five seeds"


def trained(network: keras.Model) -> int:
    return sum(int(np.prod(weight.shape)) for weight in network.trainable_variables)


def test_the_rivals_have_our_network():
    assert speed.WIDTHS == STAGE1_WIDTHS
    ours, stock = speed.our_network("float32"), speed.stock_keras("float32")
    assert speed.multiply_adds(ours) == speed.multiply_adds(stock) == pytest.approx(118e6, rel=0.01)
    assert trained(ours) == trained(stock)
    stage2 = speed.our_network("float32", STAGE2_WIDTHS)
    assert speed.multiply_adds(stage2) == pytest.approx(17e6, rel=0.02)


def test_the_torch_network_is_ours(monkeypatch):
    torch = pytest.importorskip("torch")
    built = []
    plain = torch.nn.Sequential
    monkeypatch.setattr(torch.nn, "Sequential", lambda *parts: built.append(plain(*parts)) or built[-1])
    images, labels = speed.random_images(16)
    epoch = speed.torch_epoch(False, False, images, labels)
    before = [weight.detach().clone() for weight in built[0].parameters() if weight.requires_grad]
    assert epoch() > 0
    after = [weight for weight in built[0].parameters() if weight.requires_grad]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    weights = sum(weight.numel() for weight in built[0].parameters() if weight.requires_grad)
    assert weights == trained(speed.stock_keras("float32"))


def test_a_hand_written_epoch_trains(monkeypatch):
    network = speed.our_network("float32")
    monkeypatch.setattr(speed, "our_network", lambda policy: network)
    images, labels = speed.random_images(2 * speed.BATCH)
    before = [weight.numpy() for weight in network.trainable_variables]
    assert speed.hand_written_epoch("float32", images[:600], labels[:600])() > 0
    assert not any(np.array_equal(old, new) for old, new in zip(before, network.trainable_variables, strict=True))


@pytest.mark.slow
def test_the_model_for_timing_decide_predicts_all_categories():
    """Else one Stage 2 CNN would get every image, in one large and fast batch."""
    model = speed.spread_model(flip=True)
    category = model.decide(speed.random_images(1000)[0]).stage1_category
    assert np.bincount(category, minlength=10).min() > 40


def test_an_unknown_measurement_is_refused():
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--only", "trainin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "unknown measurement trainin: choose among training, decide" in done.stderr


def test_tables_show_the_ratios():
    rates = {"ours": [200.0, 300.0, 400.0], "baseline": [100.0, 100.0, 100.0]}
    figures = {"policy": "float32", "images_per_second": rates}
    figures |= {"convolutions_gflops": [1e3], "share_of_convolutions": [0.8]}
    figures |= {"float32_over_stock": [1.5], "torch": "2"}
    text = "\n".join(speed.table_training(figures))
    assert "| baseline | 100 (100 to 100) | 3.00 (2.00 to 4.00) |" in text
    short = {"seed": 0, "epochs": 4, "accuracy": 0.9023, "saved_after": 40.0}
    whole = {"seed": 0, "epochs": 9, "accuracy": 0.9223, "saved_after": 99.0}
    text = "\n".join(speed.table_time_to_accuracy({"light": False, "trainings": [whole, short]}))
    assert "| 0 | 40 | 99 | not reached | not reached |" in text
    assert text.index("| 0 | 4 | 90.23% | 40 |") < text.index("| 0 | 9 | 92.23% | 99 |")
    growth = {
        "policy": "float32",
        "images": {"5000": [[1000.0, 1.0]]},
        "categories": {"10": [[2.0, 1.0]], "50": [[2.2, 1.5]]},
    }
    assert "| 50 | 2.2 | 1.10 | 1.50 |" in speed.table_growth(growth)


@pytest.mark.parametrize(("accuracies", "verdict"), [((0.08, 0.1, 0.125), "as it should be"), ((0.2, 0.21), "WRONG")])
def test_shuffled_labels_have_to_give_chance_on_average(accuracies, verdict):
    assert verdict in "\n".join(speed.table_control({"accuracies": accuracies}))


def test_training_seconds_are_those_of_every_part():
    epochs = {"seconds": [1.0, 2.0]}
    history = {"stage1": epochs, "stage2_base": epochs, "stage2": {"ship": epochs, "truck": {"seconds": [4.0]}}}
    seconds = {"stage1": 3.0, "stage2_base": 3.0, "stage2": 7.0, "retraining": 0}
    assert quality.training_seconds(history) == seconds
    history["retraining"] = {"histories": {"cat": epochs}}
    assert quality.training_seconds(history) == {**seconds, "retraining": 3.0}


def test_a_variant_is_compared_seed_by_seed():
    runs = [{"accuracy": a, "aurc": 0.1} for a in (0.80, 0.84, 0.82)]
    worse = [{"accuracy": a, "aurc": 0.2} for a in (0.79, 0.80, 0.80)]
    results = {"variants": {"the recipe": runs, "without salt": worse}}
    results |= {"command": "python x", "commit": "abc", "device": "some processor", "versions": {"python": "3"}}
    shown = ablations.table(results)
    assert "| without salt | 80.00% (79.00% to 80.00%) | -2.00 (-4.00 to -1.00) |" in shown
    assert "+100.0% (+100.0% to +100.0%) |" in shown


EVERY_VARIANT = ablations.VARIANTS | ablations.REGULARIZERS


def trained_by(variant: str, tiny_data) -> np.ndarray:
    """All weights of a small network after six steps."""
    data = dataclasses.replace(tiny_data, train=tiny_data.train.take(np.arange(32)))
    widths = {"stage1_widths": (8, 8), "stage2_widths": (8, 8)}
    network = mscnn.MultiStageCNN.for_dataset(data, "float32", **widths).stage2_base
    training = ablations.Training(network, mscnn.Recipe(epochs=3, batch_size=16), steps=6, callbacks=[])
    EVERY_VARIANT[variant](training)
    training.run(data)
    return np.concatenate([weight.ravel() for weight in network.get_weights()])


@pytest.fixture(scope="module")
def trained_by_the_recipe(tiny_data) -> np.ndarray:
    return trained_by("the recipe", tiny_data)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY_VARIANT if name != "the recipe"])
def test_each_variant_changes_the_training_and_it_still_runs(tiny_data, trained_by_the_recipe, name):
    weights = trained_by(name, tiny_data)
    assert np.isfinite(weights).all() and not np.array_equal(weights, trained_by_the_recipe)


def test_averaged_weights_are_the_mean_of_the_last_quarter(tiny_data, monkeypatch):
    """Of six steps the fifth, since it is a fifth one, and the last."""
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(self.model.network.get_layer("logits").kernel.numpy())

    network = mscnn.MultiStageCNN.for_dataset(tiny_data, "float32", stage2_widths=(8, 8)).stage2_base
    data = dataclasses.replace(tiny_data, train=tiny_data.train.take(np.arange(32)))
    recipe = mscnn.Recipe(epochs=3, batch_size=16)
    training = ablations.Training(network, recipe, steps=6, callbacks=[Watch()])
    ablations.with_averaged_weights(training)
    patch_rooms(monkeypatch, "RestoreBestWeights", keras.callbacks.Callback)
    mscnn.train_classifier(network, data, recipe, callbacks=training.callbacks)
    mean = np.mean([seen[4], seen[5]], axis=0)
    np.testing.assert_allclose(network.get_layer("logits").kernel.numpy(), mean, rtol=1e-5, atol=1e-7)


def test_a_mixture_keeps_its_share_of_each_image():
    images = np.arange(6 * 16 * 16 * 3, dtype=np.float32).reshape(6, 16, 16, 3)
    mixtures = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablations, "mixed", lambda _, mix: mixtures.update({len(mixtures): mix}))
        ablations.with_mixup(None)
        ablations.with_cutmix(None)
    for number, mix in mixtures.items():
        for seed in range(5):
            keras.utils.set_random_seed(seed)
            one, share = (np.asarray(part) for part in mix(np.zeros_like(images), np.ones_like(images)))
            assert one.mean() == pytest.approx(1 - share, abs=1e-5) and 0.5 <= share <= 1, number


def quick_figures(benchmark, tmp_path, monkeypatch) -> dict:
    """What the quick form of a benchmark writes, into a folder of its own."""
    name = benchmark.__name__
    monkeypatch.setattr(common, "HERE", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    benchmark.main()
    return json.loads((tmp_path / f"{name}.json").read_text("utf-8"))


@pytest.mark.slow
def test_the_quick_form_measures_everything(tmp_path, monkeypatch):
    figures = quick_figures(speed, tmp_path, monkeypatch)
    assert list(figures) == list(speed.MEASURES)
    assert abs(np.mean(figures["control"]["results"]["accuracies"]) - 0.1) < 0.037


@pytest.mark.slow
def test_the_quick_form_of_craft_leaves_the_figures_as_they_are(monkeypatch, capsys):
    before = (ROOT / "benchmarks/craft.json").read_bytes()
    monkeypatch.setattr(sys, "argv", ["craft.py", "--quick"])
    craft.main()
    assert (ROOT / "benchmarks/craft.json").read_bytes() == before
    assert "mixed_float16" in capsys.readouterr().out


@pytest.mark.slow
def test_the_quick_form_trains_every_variant(tmp_path, monkeypatch):
    results = quick_figures(ablations, tmp_path, monkeypatch)
    assert list(results["regularizers"]["variants"]) == list(ablations.REGULARIZERS)
    variants = results["variants"]
    assert list(variants) == list(ablations.VARIANTS)
    assert all(0.05 < run["accuracy"] < 0.9 for runs in variants.values() for run in runs)
    assert variants["the recipe"][0]["accuracy"] > 0.2, "chance is 0.1"


@pytest.mark.slow
def test_a_network_is_measured():
    figures = networks.measure(networks.QUICK, 0)
    assert figures["parameters"] > 184_586 and len(figures["val_accuracy"]) == 2
    row = {"MNIST, mnist": {"0": {**figures, "commit": "a", "device": "b", "row": networks.QUICK._asdict()}}}
    table = networks.table(row)
    assert f"| MNIST, mnist | 0 | 28 | {figures['accuracy']:.1%} |" in table
    # The epochs that were measured, not those of ROWS.
    assert re.search(r"^\| MNIST, mnist .*\| 2 \| (1|2|not reached) \|$", table, re.M)
