"""Every figure is made from arrays, says what it shows, and leaves nothing behind."""

import ast
import io
import itertools
import warnings
from pathlib import Path

import matplotlib
import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import patch_rooms

import mscnn_helpers as mscnn
from mscnn_parts import figures
from mscnn_parts.explanation import DecisionTrace
from mscnn_parts.figures import _characters_in, _font_with, _warn_of_boxes, make_legible
from mscnn_parts.metrics import calibration_error
from mscnn_parts.sources import CIFAR10_NAMES
from mscnn_parts.training import RetrainingResult

NAMES = CIFAR10_NAMES
RNG = np.random.default_rng(0)


def decisions_of(count: int) -> mscnn.Decisions:
    confidence, stage1 = np.linspace(0.05, 0.95, count), np.arange(count) % 10
    final = np.where(confidence >= 0.5, stage1, 10)
    logits = np.zeros((count, 10), np.float32)
    return mscnn.Decisions(final, stage1, *[confidence] * 6, logits, logits, np.zeros(count))


def pictures(count: int, channels: int = 3) -> np.ndarray:
    return RNG.integers(0, 256, (count, 32, 32, channels), dtype=np.uint8)


def trace(
    truth: str = "ship",
    verdict: str = mscnn.OTHER,
    channels: int = 3,
    heat: float = 1.0,
    reason: str = mscnn.LOW_CONFIDENCE,
) -> DecisionTrace:
    maps = heat * RNG.random((2, 7, 7)).astype(np.float32)
    top = [("ship", 0.6), ("truck", 0.3), ("cat", 0.1)]
    return DecisionTrace(pictures(1, channels)[0], truth, *maps, top, 0.4, 0.55, verdict, reason)


def run_of(count: int) -> dict[str, list[float]]:
    falling = list(np.linspace(2, 0.1, count))
    return {"loss": falling, "val_loss": falling, "accuracy": falling[::-1], "val_accuracy": falling[::-1]}


def scores(count: int) -> tuple[np.ndarray, np.ndarray]:
    confidence = np.linspace(0, 1, count)
    return confidence, RNG.random(count) < confidence


RETRAINED = [RetrainingResult("ship", 0.4, 0.3, True), RetrainingResult("truck", 0.2, 0.5, False)]

# Each figure with plenty, with one and with nothing to show.
FIGURES = {
    "images": lambda n: mscnn.plot_images(pictures(n), [str(i) for i in range(n)], "title"),
    "history": lambda n: mscnn.plot_history(
        {"stage1": run_of(n), "stage2_base": run_of(n), "stage2": {name: run_of(n) for name in NAMES[:n]}} if n else {}
    ),
    "confusion": lambda n: mscnn.plot_confusion(
        mscnn.decision_confusion(np.arange(n) % 10, np.arange(n) % 11, NAMES) if n else np.zeros((11, 11), int),
        NAMES,
        "title",
    ),
    "risk_coverage": lambda n: mscnn.plot_risk_coverage(
        {"both": scores(n), "Stage 1": scores(n)}, {"both": scores(n)[1]}
    ),
    "reliability": lambda n: mscnn.plot_reliability({"both": scores(n)}),
    "gallery": lambda n: mscnn.plot_gallery(pictures(n), decisions_of(n), np.arange(n) % 10, NAMES, "title"),
    "thresholds": lambda n: mscnn.plot_thresholds(*scores(n), np.linspace(0, 1, 21), 0.7, "calibration"),
    "retraining": lambda n: mscnn.plot_retraining(RETRAINED[:n]),
    "decision_traces": lambda n: mscnn.plot_decision_traces([trace() for _ in range(min(n, 3))]),
}
OF_DATA = ("samples", "augmentation")  # these take a data set, see below


@pytest.fixture(autouse=True)
def nothing_is_shown_and_nothing_stays_open(monkeypatch):
    def shown(*_, **__):
        raise AssertionError("a figure was shown")

    monkeypatch.setattr(plt, "show", shown)
    monkeypatch.setattr(matplotlib.figure.Figure, "show", shown)
    plt.close("all")
    yield
    assert plt.get_fignums() == []


def rendered(figure) -> bytes:
    """The figure as it is saved; errors in the layout show only here."""
    assert isinstance(figure, matplotlib.figure.Figure)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=40)
    return content.getvalue()


def texts(figure) -> list[str]:
    """All that can be read in a figure."""
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]


def test_every_figure_of_the_module_is_tested():
    tree = ast.parse(Path(figures.__file__).read_text("utf-8"))
    made = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("plot_")}
    assert made == {f"plot_{name}" for name in (*FIGURES, *OF_DATA)}


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("error")
def test_a_figure_can_be_saved(name):
    picture = rendered(FIGURES[name](20))
    assert picture.startswith(b"\x89PNG") and len(picture) > 2000


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value encountered")
def test_a_figure_of_nothing_or_of_one_is_no_error(name, count):
    assert rendered(FIGURES[name](count)).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["history", "confusion", "risk_coverage", "reliability", "thresholds", "retraining"])
def test_every_plot_has_a_title_and_named_axes(name):
    figure = FIGURES[name](20)
    plots = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    for axis in plots:
        assert axis.get_title() and axis.get_ylabel()
        assert axis.get_xlabel() or name == "retraining"  # there the categories stand below


@pytest.mark.parametrize("name", ["images", "gallery"])
def test_a_grid_has_its_title(name):
    assert FIGURES[name](3).get_suptitle() == "title"


def test_history_has_a_row_for_each_stage_that_was_trained():
    history = {"stage1": run_of(4), "stage2": {"cat": run_of(3), "dog": run_of(3)}}
    figure = mscnn.plot_history(history)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 4 and titles[0] == titles[1] == "Stage 1" and titles[2].startswith("Stage 2")
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss", "accuracy"] * 2
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), history["stage1"]["loss"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "calibration"]
    assert len(figure.axes[2].lines) == 2 * (2 + 1)  # train and calibration: two categories and their mean


def test_a_single_epoch_is_a_point_at_1():
    figure = mscnn.plot_history({"stage1": run_of(1)})
    for axis in figure.axes:
        assert axis.get_xlim() == (0.5, 1.5)
        assert [line.get_marker() for line in axis.lines] == ["o", "o"]


def test_history_without_validation_of_a_category():
    """A category that Stage 1 never predicts has no validation history."""
    partial = {key: values for key, values in run_of(3).items() if not key.startswith("val_")}
    rendered(mscnn.plot_history({"stage2": {"cat": run_of(3), "dog": partial}}))


def test_confusion_shows_counts_and_other():
    matrix = np.zeros((11, 11), int)
    matrix[3, 10] = 42
    figure = mscnn.plot_confusion(matrix, NAMES, "Stage report")
    axis = figure.axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == [*NAMES, mscnn.OTHER]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [*NAMES, mscnn.OTHER]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("decided", "true", "Stage report")
    assert "42" in texts(figure)


def test_risk_coverage_draws_the_curve_and_marks_the_decision():
    confidence, correct = np.array([0.9, 0.8, 0.7, 0.1]), np.array([True, True, False, False])
    figure = mscnn.plot_risk_coverage({"both": (confidence, correct)}, {"both": confidence >= 0.7})
    curve, mark, _ = figure.axes[0].lines
    np.testing.assert_allclose(curve.get_xdata(), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(curve.get_ydata(), [0, 0, 1 / 3, 1 / 2])
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (0.75, pytest.approx(1 / 3))
    assert {f"both (AURC {mscnn.aurc(confidence, correct):.4f})", "what decide() accepts"} <= set(texts(figure))


def test_reliability_names_the_calibration_error():
    confidence, correct = scores(500)
    assert f"both (ECE {calibration_error(confidence, correct):.3f})" in texts(
        mscnn.plot_reliability({"both": (confidence, correct)})
    )


def test_reliability_joins_no_bin_of_a_few_images():
    confidence = np.repeat([0.15, 0.55, 0.95], [2, 10, 30])
    axis = mscnn.plot_reliability({"both": (confidence, confidence > 0.5)}).axes[0]
    _, line, dots = axis.lines
    np.testing.assert_allclose(line.get_xdata(), [0.55, 0.95])
    assert (line.get_linestyle(), dots.get_linestyle()) == ("-", "None")
    np.testing.assert_allclose(dots.get_xdata(), [0.15])
    assert "fewer than 10 images" in axis.get_title()


def test_thresholds_draw_coverage_and_accuracy():
    confidence, correct = np.array([0.2, 0.4, 0.6, 0.8]), np.array([False, True, False, True])
    figure = mscnn.plot_thresholds(confidence, correct, [0, 0.5, 0.7, 0.9], marked=0.5, split="calibration")
    coverage, accuracy, mark = figure.axes[0].lines
    np.testing.assert_allclose(coverage.get_ydata(), [1, 0.5, 0.25, 0])
    np.testing.assert_allclose(accuracy.get_ydata(), [0.5, 0.5, 1, np.nan])
    assert set(mark.get_xdata()) == {0.5}
    assert "0.50" in figure.axes[0].get_title()
    rejected = np.array([False, False, True, False])
    figure = mscnn.plot_thresholds(confidence, correct, [0, 0.5], np.array([0.5, 0.7]), "calibration", rejected)
    coverage, accuracy, *marks = figure.axes[0].lines
    np.testing.assert_allclose(coverage.get_ydata(), [0.75, 0.25])
    np.testing.assert_allclose(accuracy.get_ydata(), [2 / 3, 1])
    assert [mark.get_xdata()[0] for mark in marks] == [0.5, 0.7]


def test_retraining_says_what_was_kept():
    figure = mscnn.plot_retraining(RETRAINED)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["ship\nkept", "truck\nrolled back"]
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [0.4, 0.2, 0.3, 0.5]
    assert [bool(bar.get_hatch()) for bar in bars] == [False, False, False, True], "what was rolled back"


def test_gallery_says_what_was_decided_and_what_is_true():
    figure = mscnn.plot_gallery(pictures(2), decisions_of(2), np.array([8, 1]), NAMES, "title")
    assert [axis.get_title() for axis in figure.axes[:2]] == [
        "OTHER (airplane?)\nconfidence 5.0%\ntrue: ship",
        "automobile\nconfidence 95.0%\ntrue: automobile",
    ]


def test_long_names_do_not_run_into_the_next_image():
    names = ["a name of a folder", "t-shirt and top", *NAMES[2:]]
    figure = mscnn.plot_gallery(pictures(4), decisions_of(4), np.array([1, 0, 1, 0]), names, "title")
    rendered(figure)
    boxes = [axis.title.get_window_extent() for axis in figure.axes[:4]]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes)) and boxes[0].x0 >= 0


def test_no_confidence_short_of_certainty_is_shown_as_certain():
    decisions = decisions_of(2)._replace(confidence=np.array([0.69999, 0.99996]))
    figure = mscnn.plot_gallery(pictures(2), decisions, np.array([8, 1]), NAMES, "title")
    titles = [axis.get_title() for axis in figure.axes[:2]]
    assert "confidence 69.9%" in titles[0] and "confidence 99.9%" in titles[1]


def test_select_takes_all_fields_of_some_images():
    whole, chosen = decisions_of(10), np.array([7, 2])
    for part, values in zip(whole.take(chosen), whole, strict=True):
        np.testing.assert_array_equal(part, values[chosen])


def test_decision_traces_are_one_row_an_image():
    figure = mscnn.plot_decision_traces([trace("ship"), trace("", "truck")])
    assert len(figure.axes) == 8
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "true: ship" and titles[4] == "your image"
    assert titles[1].startswith("Stage 1") and titles[2].startswith("Stage 2")
    read = "\n".join(texts(figure))
    assert "✗" not in read  # neither is wrong: one is rejected, of the other the truth is not known
    assert "truck ✗\n55.0%" in texts(mscnn.plot_decision_traces([trace("ship", "truck")]))
    for part in (
        "ship 60.0%",
        "truck 30.0%",
        "cat 10.0%",
        "Stage 2 alone: 40%",
        "OTHER, low confidence\nship? 55.0%",
        "truck\n55.0%",
    ):
        assert part in read
    strange = texts(mscnn.plot_decision_traces([trace(reason=mscnn.OUT_OF_DISTRIBUTION)]))
    assert "OTHER\nout of distribution" in strange, "without a confidence, which means nothing there"


def test_the_map_lies_over_the_whole_image():
    picture, first = mscnn.plot_decision_traces([trace()]).axes[:2]
    image, heat = first.get_images()
    assert heat.get_extent() == image.get_extent() == picture.get_images()[0].get_extent()
    assert heat.get_array().max() == 1 and heat.get_cmap().name == mscnn.CAM_COLORMAP


@pytest.mark.filterwarnings("error")
def test_an_empty_map_and_a_grey_image_can_be_drawn():
    rendered(mscnn.plot_decision_traces([trace(channels=1, heat=0.0)]))


def test_samples_show_every_category(tiny_data, digits):
    figure = mscnn.plot_samples(tiny_data, columns=3)
    assert set(tiny_data.category_names) <= set(texts(figure))
    assert "tiny: 3 train images of each category" in texts(figure)
    assert [len(axis.get_images()) for axis in figure.axes] == [1] * 15
    rendered(figure)
    rendered(mscnn.plot_samples(digits, columns=2))  # gray


def test_augmentation_shows_the_original_first(tiny_data):
    figure = mscnn.plot_augmentation(tiny_data, columns=4, rows=2)
    assert len(figure.axes) == 8 and [axis.get_title() for axis in figure.axes[:2]] == ["original", "epoch 1"]
    shown = [axis.get_images()[0].get_array() for axis in figure.axes]
    np.testing.assert_array_equal(shown[0], tiny_data.train.images[0])
    np.testing.assert_array_equal(shown[4], tiny_data.train.images[1])
    assert any((one != shown[0]).any() for one in shown[1:4])
    rendered(figure)


@pytest.mark.parametrize(("count", "named"), [(30, 31), (60, 61), (300, 76)])
def test_confusion_of_many_categories(count, named, monkeypatch):
    from matplotlib.backends import backend_agg

    pictures = []
    drawn = backend_agg.RendererAgg.__init__
    monkeypatch.setattr(backend_agg.RendererAgg, "__init__", lambda *a: (pictures.append(a[1:3]), drawn(*a))[1])
    figure = mscnn.plot_confusion(np.eye(count + 1, dtype=int), [f"c{i}" for i in range(count)], "many")
    assert len(pictures) < 5, "each takes its megabytes"
    assert max(figure.get_size_inches()) < 21
    assert len(figure.axes[0].get_yticklabels()) == named
    assert len(figure.axes[0].texts) == (31**2 if count == 30 else 0)


@pytest.mark.parametrize("name", ["$$", "a$_$b", "$x$", "5$", r"\$a$"])
def test_names_are_drawn_as_they_are(name, tmp_path):
    from matplotlib.text import Text

    drawn = trace(truth=name, verdict=name)._replace(top3=[(name, 0.5)] * 3)
    figures = {
        "confusion": mscnn.plot_confusion(np.eye(2, dtype=int), (name, "x"), name),
        "images": mscnn.plot_images(pictures(1), [name], name),
        "retraining": mscnn.plot_retraining([RetrainingResult(name, 0.4, 0.3, True)]),
        "traces": mscnn.plot_decision_traces([drawn]),
        "risk": mscnn.plot_risk_coverage({name: scores(5)}),
        "reliability": mscnn.plot_reliability({name: scores(5)}),
    }
    for what, figure in figures.items():
        figure.savefig(tmp_path / "figure.svg")  # a formula that is none raises here
        read = [one._preprocess_math(one.get_text()) for one in figure.findobj(Text)]
        assert any(name in text for text, _ in read), what
        assert not any(math and name in text for text, math in read), what


def test_powers_on_a_logarithmic_axis_stay_formulas():
    figure, axis = plt.subplots()
    plt.close(figure)
    axis.plot([1, 1000])
    axis.set(yscale="symlog", title="$ and $")
    make_legible(figure)
    figure.canvas.draw()
    assert not axis.title.get_parse_math()
    assert all(text.get_parse_math() for text in axis.get_yticklabels())
    assert any("10^" in text.get_text() for text in axis.get_yticklabels())


def test_names_in_another_script_take_a_font_that_has_it(monkeypatch):
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.text import Text

    patch_rooms(monkeypatch, "_warn_of_boxes", lambda script: pytest.fail(f"{script} can be drawn"))
    name = "⌒⌓"  # which DejaVu Sans lacks, and another of Matplotlib's own fonts has
    assert not set(name) & _characters_in(findfont(FontProperties()))
    figure = mscnn.plot_images(pictures(2), [name, "cat"])
    figure.canvas.draw()
    fonts = {text.get_text(): text.get_fontfamily() for text in figure.findobj(Text)}
    assert set(name) <= _characters_in(findfont(FontProperties(family=[fonts[name][-1]])))
    assert len(fonts["cat"]) == 1


def test_a_script_without_a_font_gives_one_note(monkeypatch):
    for cached in (_font_with, _warn_of_boxes):
        cached.cache_clear()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for names in (["𓀀", "cat"], ["𓀀𓀁", "cat"]):  # hieroglyphs
            mscnn.plot_confusion(np.eye(2, dtype=int), names, "two").canvas.draw()
            mscnn.plot_images(pictures(2), names).canvas.draw()
    (note,) = told
    assert str(note.message).startswith("No installed font has these EGYPTIAN characters: figures show boxes there")


def test_the_threshold_explorer_counts_and_needs_no_kernel():
    confidence, correct = np.array([0.2, 0.6, 0.7, 0.9]), np.array([False, True, False, True])
    explorer = mscnn.ThresholdExplorer(confidence, correct, 0.7)
    assert repr(explorer) == "threshold 0.7000: 50.0% accepted, 50.0% of them correct"
    page = explorer._repr_html_()
    assert repr(explorer) in page and page.count("<polyline") == 2
    assert '{"right": [0.6, 0.9], "wrong": [0.2, 0.7], "all": 4}' in page
    assert "http" not in page, "it works offline"
    assert "nothing to measure" in repr(mscnn.ThresholdExplorer(confidence, correct, 1.0))
    rejecting = mscnn.ThresholdExplorer(confidence, correct, [0.6, 0.8], np.array([False, False, True, False]))
    assert repr(rejecting) == "threshold 0.7000: 25.0% accepted, 100.0% of them correct"
    assert "0.0% accepted, nothing to measure" in repr(mscnn.ThresholdExplorer([], np.array([], bool), 0.7))
