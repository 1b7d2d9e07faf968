"""The benchmark of confidences: its baselines by hand-worked cases, the bootstrap, and one quick form end to end."""

import json
import sys

import common
import keras
import numpy as np
import pytest
import selective
from scipy.special import expit, log_softmax, softmax

import mscnn_helpers as mscnn
from mscnn_parts.metrics import augrc


def random_split(count: int, seed: int) -> selective.Split:
    """Logits that know the label a little, and verifiers that know whether Stage 1 is correct."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    truth = np.eye(4)[labels]
    stage1, stage2_base = (rng.normal(size=(2, count, 4)) + 1.5 * truth for _ in range(2))
    correct = stage1[0].argmax(axis=1) == labels
    stage2 = rng.normal(size=(2, count)) + 3 * (2.0 * correct - 1)
    distance = np.abs(rng.normal(size=(len(selective.NEIGHBOURS), count))) + ~correct
    return selective.Split(
        labels, stage1, stage2_base, stage2, stage2, rng.uniform(size=count), distance, softmax(stage2_base[0], 1)
    )


def found_for(seed: int) -> dict[str, np.ndarray]:
    parts = {name: random_split(400, 10 * seed + i) for i, name in enumerate(("calibration", "test"))}
    results = {f"{name}_{field}": value for name, split in parts.items() for field, value in split._asdict().items()}
    noise = np.random.default_rng(seed).normal(size=(4, 400, 4))
    rng = np.random.default_rng(seed)
    results["test_in_distribution"] = rng.random(400) < 0.5
    results["certification_ours"] = rng.uniform(size=2_000)
    results["certification_correct"] = rng.uniform(size=2_000) < results["certification_ours"]
    return {**results, "test_pool": np.concatenate([results["test_stage1"][:1], results["test_stage1"][:1] + noise])}


def test_scores_of_logits_by_hand():
    logits = np.array([[4.0, 1.0, 1.0], [0.0, 0.0, 3.0]])
    np.testing.assert_allclose(selective.p_norm(logits, 2), [2 / np.sqrt(6), 2 / np.sqrt(6)])
    np.testing.assert_allclose(selective.p_norm(logits, 3), [2 / 10 ** (1 / 3)] * 2)  # centred: 2, -1, -1
    p = softmax(logits, axis=1)
    np.testing.assert_allclose(selective.negative_entropy(logits), (p * np.log(p)).sum(axis=1))
    np.testing.assert_allclose(expit(selective.softmax_odds(logits)), p.max(axis=1))


def test_the_temperature_has_the_least_log_loss():
    split = random_split(2_000, 0)
    fitted = selective.temperature(split)
    loss = {
        t: -log_softmax(split.stage1[0] / t, axis=1)[np.arange(2_000), split.labels].mean()
        for t in (fitted, 0.98 * fitted, 1.02 * fitted)
    }
    assert min(loss, key=loss.get) == fitted


def test_distances_to_neighbours_against_a_loop():
    rng = np.random.default_rng(0)
    train, features = rng.normal(size=(60, 5)), rng.normal(size=(7, 5))
    got = selective.neighbour_distance(train, features)
    for i, one in enumerate(features):
        unit = one / np.linalg.norm(one)
        distances = sorted(np.linalg.norm(unit - t / np.linalg.norm(t)) for t in train)
        np.testing.assert_allclose(got[:, i], [distances[k - 1] for k in selective.NEIGHBOURS])


def test_dropout_averages_random_passes():
    model = mscnn.build_cnn("stage1", (32, 32, 3), 4, (4, 4), [128.0] * 3, [64.0] * 3, True, "float32")
    network = selective.with_dropout(model)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    probability = selective.dropout_softmax(network, images, seed=0)
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    plain = softmax(np.asarray(network(images)), axis=1)  # without dropout
    assert 1e-6 < np.abs(probability - plain).max() < 0.3
    assert isinstance(network.get_layer("dropout"), keras.layers.Dropout)


def test_both_views_are_of_the_image_and_its_mirror_image():
    images = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    got = selective.both_views(lambda view: view[:, :, 0, 0].astype(np.float32), images)
    assert np.array_equal(got, [images[:, :, 0, 0], images[:, :, -1, 0]])


def test_every_method_answers_and_costs_something():
    form = selective.FULL
    answers = selective.answers(found_for(0), form)
    for name, answer in answers.items():
        assert answer.category.shape == answer.confidence.shape == (400,)
        assert np.isfinite(answer.confidence).all(), name
    assert {"softmax", "ours", "stage2_base", "mirror", "dropout", "ensemble of 2", "ensemble of 5"} <= set(answers)
    cost = {method.name: method.cost(90.0, 18.0) for method in selective.methods_of(found_for(0), form)}
    assert cost.keys() == answers.keys() and min(cost.values()) >= 1
    assert cost["ensemble of 5, our answers"] == 5 and cost["ours"] == pytest.approx(2.4)

    def judging(those: np.ndarray) -> set[str]:
        return {name for name, one in answers.items() if np.array_equal(one.category, those)}

    stage1 = found_for(0)["test_stage1"]
    one_look = {"softmax", "temperature", "margin", "entropy", "p-norm", "neighbours", "ours, one view"}
    one_look |= {"ours, answers on a single view"}
    assert judging(stage1[0].argmax(axis=1)) == one_look
    assert set(answers) - judging(stage1.mean(axis=0).argmax(axis=1)) == one_look | {
        "dropout", "ensemble of 2", "ensemble of 5", "ensemble of 2, margin", "ensemble of 5, margin",
    }, "answers of their own"  # fmt: skip


def test_what_is_fitted_never_sees_the_test_labels():
    results = found_for(0)
    before = selective.answers(results, selective.FULL)
    results["test_labels"] = np.roll(results["test_labels"], 1)
    after = selective.answers(results, selective.FULL)
    for name in before:
        assert np.array_equal(before[name].confidence, after[name].confidence), name


def test_a_good_second_opinion_is_found_to_be_better():
    answers = selective.answers(found_for(0), selective.FULL)
    labels = found_for(0)["test_labels"]
    aurc = {name: selective.measures(answer, labels)["aurc"] for name, answer in answers.items()}
    assert aurc["ours, one view"] < 0.8 * aurc["softmax"]


def test_measures_of_a_perfect_order():
    answer = selective.Answers(np.zeros(10, int), np.linspace(1, 0.1, 10))
    results = selective.measures(answer, np.array([0] * 8 + [1] * 2))
    assert results["accuracy"] == 0.8 and results["e_aurc"] == pytest.approx(0) and results["auroc_failure"] == 1
    assert results["error at 80%"] == 0 and results["error at 100%"] == pytest.approx(0.2)
    assert results["coverage at 1.0%"] == 0.8
    assert "ece" not in results and "brier" not in results, "it claims no probability"
    assert {"ece", "brier"} <= set(
        selective.measures(answer._replace(probability=answer.confidence), np.zeros(10, int))
    )


def test_promises_of_a_calibrated_and_of_a_boasting_confidence():
    """Half of the images have a confidence of 0.999, the others below 0.9: the certificate accepts the former."""
    rng = np.random.default_rng(0)
    confidence = np.where(np.arange(20_000) % 2, 0.999, rng.uniform(0.5, 0.9, 20_000))
    category, correct = np.arange(20_000) % 4, rng.uniform(size=20_000) < confidence
    results = {"test_labels": np.where(correct, category, 9)}
    results |= {
        "test_in_distribution": np.full(20_000, True),
        "certification_ours": confidence,
        "certification_correct": correct,
    }
    got = selective.promises(results, selective.Answers(category, confidence))
    assert got["calibration"] == pytest.approx(got["calibration, simulated mean"], abs=0.005)
    assert got["worst calibration"] == pytest.approx(got["worst calibration, simulated mean"], abs=0.01)
    assert 0.5 <= got["certified coverage"] < 0.55 and got["certified error"] < 0.01
    assert got["calibration, simulated mean"] < got["calibration, simulated 95 %"]
    boasting = selective.promises(results, selective.Answers(category, confidence**0.2))
    assert boasting["calibration"] > 0.1 > boasting["calibration, simulated 95 %"]


def test_a_small_category_is_not_judged():
    category = np.array([0] * 1_000 + [1] * (selective.ENOUGH - 1))
    correct = category == 0
    overall, worst = selective.calibration_errors(np.full(len(category), 0.9), category, correct)
    assert worst == pytest.approx(0.1) and overall == pytest.approx(0.9 - 1_000 / len(category))


def test_a_resample_of_each_image_once_is_the_split():
    rng = np.random.default_rng(0)
    answer, labels = selective.Answers(np.zeros(300, int), rng.uniform(size=300)), rng.integers(0, 2, 300)
    for confidence in (answer.confidence, answer.confidence.round(1)):  # without ties, and with many
        got = selective.resampled(answer._replace(confidence=confidence), labels, np.ones((1, 300), int))
        assert got.aurc[0] == pytest.approx(mscnn.aurc(confidence, labels == 0))
        assert got.augrc[0] == pytest.approx(augrc(confidence, labels == 0))


def test_a_resample_is_as_if_its_images_were_there_so_many_times():
    rng = np.random.default_rng(0)
    answer, labels = selective.Answers(np.zeros(90, int), rng.uniform(size=90).round(1)), rng.integers(0, 2, 90)
    counts = rng.multinomial(90, np.full(90, 1 / 90), 3)
    got = selective.resampled(answer, labels, counts)
    for i, count in enumerate(counts):
        confidence, correct = np.repeat(answer.confidence, count), np.repeat(labels == 0, count)
        assert got.aurc[i] == pytest.approx(mscnn.aurc(confidence, correct))
        assert got.augrc[i] == pytest.approx(augrc(confidence, correct))


def test_seeds_that_share_their_images_are_not_independent():
    """Three copies of one seed tell no more than the one."""
    rng = np.random.default_rng(7)
    labels = (rng.uniform(size=500) < 0.2).astype(int)
    scores = {name: rng.normal(size=500) + 2 * (labels == 0) for name in ("ours", "baseline")}
    one = {name: selective.Answers(np.zeros(500, int), score) for name, score in scores.items()}
    single, copies = (selective.differences([one] * n, [labels] * n, 400)["aurc"]["baseline"] for n in (1, 3))
    assert single[0] < single[1] < single[2]
    np.testing.assert_allclose(copies, single, rtol=1e-6)


def test_an_image_that_two_seeds_share_is_drawn_for_both():
    """Seeds with the same images in another order tell no more than one of them; with other images they do."""
    rng = np.random.default_rng(7)
    labels, order = (rng.uniform(size=500) < 0.2).astype(int), rng.permutation(500)
    scores = {name: rng.normal(size=500) + 2 * (labels == 0) for name in ("ours", "baseline")}
    one = {name: selective.Answers(np.zeros(500, int), score) for name, score in scores.items()}
    other = {name: selective.Answers(np.zeros(500, int), score[order]) for name, score in scores.items()}
    six = [one, *[other] * 5], [labels, *[labels[order]] * 5]

    def interval(*images: np.ndarray) -> list[float]:
        return selective.differences(*six, 400, images)["aurc"]["baseline"]

    single = selective.differences([one], [labels], 400)["aurc"]["baseline"]
    np.testing.assert_allclose(interval(np.arange(500), *[order] * 5), single, rtol=1e-6)
    low, _, high = interval(*np.arange(3000).reshape(6, 500))
    assert high - low < 0.8 * (single[2] - single[0])


def test_pairs_of_networks_share_as_few_as_they_can():
    pairs = [{seed, selective.others(selective.FULL, seed)[0]} for seed in selective.FULL.seeds]
    assert len(set.union(*pairs)) == 9, "ten places, nine networks"
    for seed in selective.FULL.seeds:
        assert len({seed, *selective.others(selective.FULL, seed)}) == 5


def test_a_model_says_at_which_commit_it_was_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(selective, "in_fresh_process", lambda _, form, seed, dropout, path: path.touch())
    monkeypatch.setattr(selective, "commit", lambda: "abc+")
    form = selective.FULL._replace(root=tmp_path)
    selective.store(form).mkdir(parents=True)
    assert selective.trained_at(selective.single_network(form, 7, dropout=False)) == "abc+"
    known = [{"command": "python mscnn_helpers.py --run_dir runs/quality/full_3", "commit": "def"}]
    monkeypatch.setattr(common, "read_json", lambda *_: known)
    assert selective.trained_at(selective.whole_path(selective.FULL, 3)) == "def"
    assert selective.trained_at(selective.whole_path(selective.FULL, 4)) == "unknown"


def test_a_method_that_some_seeds_lack_is_compared_on_the_others():
    rng = np.random.default_rng(5)
    labels = [(rng.uniform(size=500) < 0.2).astype(int) for _ in range(3)]
    every = [
        {
            name: selective.Answers(np.zeros(500, int), rng.normal(size=500) + 2 * (one == 0))
            for name in ("ours", "rare")
        }
        for one in labels
    ]
    some = [{"ours": every[0]["ours"]}, *every[1:]]
    assert selective.all_methods(some) == ["ours", "rare"]
    images = np.arange(1500).reshape(3, 500)
    got = selective.differences(some, labels, 200, images)["aurc"]["rare"]
    alone = selective.differences(every[1:], labels[1:], 200, images[1:])["aurc"]["rare"]
    np.testing.assert_allclose(got, alone)


def test_outputs_are_computed_once_for_the_same_models(tmp_path, monkeypatch):
    monkeypatch.setattr(selective, "in_fresh_process", lambda compute, *arguments: compute(*arguments))
    model, asked = tmp_path / "a.keras", []

    def compute(seed):
        asked.append(seed)
        return {"odds": np.full(3, len(asked))}

    for written, expected in (("one", 1), ("one", 1), ("another", 2)):
        model.write_text(written)
        results = selective.kept(tmp_path / "outputs_4.npz", [model], compute, 4)
        assert results["odds"].tolist() == [expected] * 3 and results["commit"]
    assert asked == [4, 4]


def test_the_bootstrap_tells_better_worse_and_equal():
    rng = np.random.default_rng(0)
    all_answers, all_labels = [], []
    for _ in range(3):
        labels = rng.integers(0, 2, 1_000) * (rng.uniform(size=1_000) < 0.3)
        correct = labels == 0
        scores = {
            name: rng.normal(size=1_000) + sharp * correct
            for name, sharp in (("ours", 2), ("worse", 0.5), ("better", 4))
        }
        scores["equal"] = scores["ours"]
        all_answers.append({name: selective.Answers(np.zeros(1_000, int), score) for name, score in scores.items()})
        all_labels.append(labels)
    for results in selective.differences(all_answers, all_labels, 200).values():
        assert results["worse"][2] < 0 < results["better"][0]
        assert results["equal"] == [0, 0, 0] and "ours" not in results


def test_the_table_sorts_by_aurc_and_leaves_out_what_is_no_probability():
    form = selective.FULL
    labels = [found_for(seed)["test_labels"] for seed in (0, 1)]
    answers = [selective.answers(found_for(seed), form) for seed in (0, 1)]
    methods = {
        name: {
            "macs": 1.0,
            "of": [0, 1] if name != "margin" else [1],
            "seeds": [selective.measures(one[name], truth) for one, truth in zip(answers, labels, strict=True)],
        }
        for name in answers[0]
    }
    promised = [selective.promises(found_for(seed), one["ours"]) for seed, one in enumerate(answers)]
    results = {"seeds": [0, 1], "methods": methods, "promises": promised, "trained_at": ["abc"], "asked_at": ["def"]}
    results |= {"differences": selective.differences(answers, labels, 100), "stage2_branch": 2}
    figures = {"command": "python x", "commit": "abc", "device": "some processor", "versions": {"python": "3"}}
    text = selective.table({**figures, "results": results})
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    ruled = sum(one.probability is not None for one in answers[0].values())
    assert len(rows) == 2 * (len(methods) + 2) + ruled + 2 + 4, "four tables, each with a header and a line below it"
    assert rows[-2].split(" | ")[-2:] == ["0.00%", "none |"], "no certificate"
    best = min(methods, key=lambda name: np.mean([one["aurc"] for one in methods[name]["seeds"]]))
    assert rows[2].startswith(f"| {best} |")
    assert next(row for row in rows if row.startswith("| margin, seeds 1 | 1.00"))
    for name in ("mirror's margin", "p-norm"):
        assert [row for row in rows if row.startswith(f"| {name} |")][1].endswith("|  |  |"), "no probability"


def test_some_seeds_alone_have_no_dropout_and_ensembles_of_their_own_networks():
    form = selective.some_seeds((1, 2))
    assert (form.seeds, form.pool, form.sizes, form.dropout) == ((1, 2), (1, 2), (2,), ())
    assert selective.some_seeds((3,)).sizes == ()
    assert selective.store(form) != selective.store(selective.FULL), "outputs with other ensembles"
    results = {name: values for name, values in found_for(0).items() if not name.endswith("_dropout")}
    answers = selective.answers({**results, "test_pool": results["test_pool"][:2]}, form)
    assert "dropout" not in answers and "ensemble of 2" in answers and "ensemble of 5" not in answers


def test_tables_alone_train_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selective, "FULL", selective.FULL._replace(root=tmp_path))
    monkeypatch.setattr(sys, "argv", ["selective.py", "--tables", "--seeds", "3,4"])
    monkeypatch.setattr(selective, "train", lambda form, seeds: pytest.fail("trains"))
    with pytest.raises(SystemExit):
        selective.main()
    assert "runs/quality/full_3/multistage_cnn_model.keras is not there" in capsys.readouterr().err
    for seed in (3, 4):
        folder = tmp_path / f"runs/quality/full_{seed}"
        folder.mkdir(parents=True)
        (folder / "multistage_cnn_model.keras").touch()
    assert len(selective.untrained(selective.some_seeds((3, 4)))) == 2, "unfinished: notebook 03 writes a model, too"
    for seed in (3, 4):
        (tmp_path / f"runs/quality/full_{seed}/metrics.json").write_text('{"two_stage": {}}')
    assert selective.untrained(selective.some_seeds((3, 4))) == []
    assert len(selective.untrained(selective.FULL)) == 3 + 4 + 3


def test_a_lesser_form_never_takes_the_place_of_a_fuller_one():
    command = "python benchmarks/selective.py"
    forms = [f"{command} --quick", f"{command} --seeds 1,2", command]
    got = [[selective.replaces(new, known) for known in forms] for new in forms]
    assert got == [[True, False, False], [True, True, False], [True, True, True]]


@pytest.mark.slow
def test_the_quick_form_trains_and_judges_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "HERE", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    monkeypatch.setattr(selective, "QUICK", selective.QUICK._replace(root=tmp_path))
    monkeypatch.setattr(sys, "argv", ["selective.py", "--quick"])
    selective.main()
    methods = json.loads((tmp_path / "selective.json").read_text("utf-8"))["results"]["methods"]
    assert methods["ours"]["seeds"][0]["aurc"] < 0.5
    assert len(methods) >= 15
