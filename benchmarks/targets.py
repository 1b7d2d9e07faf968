"""What the project wants to reach, beside what the other benchmarks have measured: the first section of RESULTS.md.

    python benchmarks/targets.py     writes the section anew; the other benchmarks do so, too

Nothing is measured here: every figure is read from quality.json, speed.json, selective.json and ood.json.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from common import has_whole_cnns, markdown, read_json, spread, write_section


class Measured(NamedTuple):
    """The benchmarks' files."""

    speed: dict
    quality: list[dict]
    selective: dict
    unknown: dict


class Target(NamedTuple):
    """A figure, and what it should be."""

    what: str
    bound: float
    at_least: bool  # else at most
    form: str  # of the figures
    values: Callable[[Measured], list[float]]  # KeyError: not measured
    below_one: bool = False  # whether all of the values have to be below 1, too
    each: bool = False  # whether each of the values has to reach it, not only their median


def faster(baseline: str, ours: str = "ours") -> Callable:
    """How many times as fast ours trains, pair by pair."""

    def values(measured: Measured) -> list[float]:
        rates = measured.speed["training"]["results"]["images_per_second"]
        return [a / b for a, b in zip(rates[ours], rates[baseline], strict=True)]

    return values


def faster_than_pytorch(measured: Measured) -> list[float]:
    """Against PyTorch's fastest mode."""
    rates = measured.speed["training"]["results"]["images_per_second"]
    modes = [name for name in rates if name.startswith("PyTorch")]
    return min((faster(name)(measured) for name in modes), key=statistics.median, default=[])


DEFAULT_BRANCH = "2"  # blocks of three that the Stage 2 CNNs of the default network share


def decide_time(images: int, by_work: bool) -> Callable:
    """decide() by two views, times Stage 1's time, or that as a multiple of the ratio of their multiply-adds."""

    def values(measured: Measured) -> list[float]:
        one = measured.speed["branches"]["results"][DEFAULT_BRANCH]
        return [time / (one["ratio_of_multiply_adds"] if by_work else 1) for time in one["ratio_of_times"][f"{images}"]]

    return values


def costs(measured: Measured, categories: int, branch: str = DEFAULT_BRANCH) -> tuple[float, float]:
    """Seconds that all verifiers train, and MB of the model file."""
    return tuple(measured.speed["branches"]["results"][branch]["costs"][f"{categories}"])


def stage2_growth(measured: Measured) -> list[float]:
    """Seconds for one Stage 2 CNN with 50 categories against 10."""
    seconds = measured.speed["growth"]["results"]["categories"]
    return [many / few for (many, _), (few, _) in zip(seconds["50"], seconds["10"], strict=True)]


def of_runs(kind: str, figure: Callable[[dict], float]) -> Callable:
    """A figure of each of quality.py's runs of one kind; of those with whole CNNs only where there are no others."""

    def values(measured: Measured) -> list[float]:
        runs = [run for run in measured.quality if (run["kind"], run["dataset"]["name"]) == (kind, "cifar10")]
        return [figure(run) for run in runs if not has_whole_cnns(run)] or list(map(figure, runs))

    return values


def stage2_ratio(run: dict) -> float:
    """All that notebook 03 does (preparing, training, calibrating, figures) against Stage 1's epochs alone."""
    return run["seconds"]["03_stage2_training"] / run["training_seconds"]["stage1"]


def not_training(run: dict) -> float:
    return 60 * run["minutes"] - sum(run["training_seconds"].values())


def stage1_accuracy(run: dict) -> float:
    return run["stage1"]["accuracy"]


def against(baseline: str, measure: str = "aurc") -> Callable:
    """Our confidence's measure as a multiple of a baseline's: median and ends of the bootstrap's 95 % interval."""

    def values(measured: Measured) -> list[float]:
        return [1 + difference for difference in measured.selective["results"]["differences"][measure][baseline]]

    return values


def of_ours(measure: str) -> Callable:
    def values(measured: Measured) -> list[float]:
        return [seed[measure] for seed in measured.selective["results"]["methods"]["ours"]["seeds"]]

    return values


def promised(name: str) -> Callable:
    """A figure of what our confidence promises."""

    def values(measured: Measured) -> list[float]:
        return [seed[name] for seed in measured.selective["results"]["promises"]]

    return values


def both_reasons_against(baseline: str) -> Callable:
    """The AURC with the OOD rejection as a multiple of a baseline's, seed by seed."""

    def values(measured: Measured) -> list[float]:
        methods = measured.selective["results"]["methods"]
        seeds = (methods[name]["seeds"] for name in ("ours, with the OOD rejection", baseline))
        return [ours["aurc"] / other["aurc"] for ours, other in zip(*seeds, strict=True)]

    return values


def told_apart(kinds: tuple[str, ...], above: str = "", models: str = "runs") -> Callable:
    """AUROC of our OOD score, the least of the kinds of unknown images; above: less that of another score."""

    def of_model(auroc: dict[str, dict[str, float]]) -> float:
        return min(auroc[kind]["ood_score"] - (auroc[kind][above] if above else 0) for kind in kinds)

    def values(measured: Measured) -> list[float]:
        return [of_model(model["auroc"]) for model in measured.unknown[models]["models"]]

    return values


def ratio_of_areas(what: str, bound: float, baseline: str, measure: str = "aurc") -> Target:
    return Target(what, bound, False, "{:.3f}", against(baseline, measure), below_one=True)


TARGETS = [
    Target("Stage 1 training, times stock Keras' in float32", 3.5, True, "{:.2f}", faster("stock Keras float32")),
    Target("Stage 1 training, times stock Keras' in bfloat16", 1.7, True, "{:.2f}",
           faster("stock Keras mixed_bfloat16")),
    Target("Stage 1 training, times PyTorch's in its fastest mode", 1.0, True, "{:.2f}", faster_than_pytorch),
    Target("Stage 1 training, times a hand-written step's", 0.9, True, "{:.2f}", faster("hand-written step")),
    Target("Stage 1 training, times that on one batch that stays in memory", 0.95, True, "{:.2f}",
           faster("ours, one resident batch")),
    Target("Stage 1 training in float32, times stock Keras' in float32", 1.15, True, "{:.2f}",
           faster("stock Keras float32", "ours in float32")),
    Target("notebook 03, Stage 2 base network and Stage 2, times Stage 1's training", 0.75, False, "{:.2f}",
           of_runs("full", stage2_ratio)),
    Target("one Stage 2 CNN of 50 categories, times one of 10", 1.1, False, "{:.2f}", stage2_growth),
    Target("decide() on 512 images, times Stage 1's seconds by multiply-adds", 1.2, False, "{:.2f}",
           decide_time(512, by_work=True)),
    Target("decide() on one image, times Stage 1's seconds", 1.8, False, "{:.2f}", decide_time(1, by_work=False)),
    Target("training of ten verifiers, times that of ten whole CNNs", 0.333, False, "{:.2f}",
           lambda measured: [costs(measured, 10)[0] / costs(measured, 10, "0")[0]]),
    Target("training of 100 verifiers, times that of ten", 2.0, False, "{:.1f}",
           lambda measured: [costs(measured, 100)[0] / costs(measured, 10)[0]]),
    Target("model of 100 categories, MB of its file", 60, False, "{:.0f}", lambda measured: [costs(measured, 100)[1]]),
    Target("light run, all that is not training, seconds", 75, False, "{:.0f}", of_runs("light", not_training)),
    Target("light run, accuracy of Stage 1 by one view", 0.68, True, "{:.1%}", of_runs("light", stage1_accuracy)),
    Target("full run, accuracy of Stage 1 by one view", 0.93, True, "{:.2%}", of_runs("full", stage1_accuracy)),
    Target("full run of 40 epochs, accuracy of Stage 1 by one view", 0.94, True, "{:.2%}",
           of_runs("long", stage1_accuracy)),
    Target("full run of 40 epochs, accuracy of Stage 1 by two views, as it answers", 0.94, True, "{:.2%}",
           of_runs("long", lambda run: run["two_stage"]["accuracy"])),
    Target("full run, minutes", 15, False, "{:.1f}", of_runs("full", lambda run: run["minutes"])),
    Target("full run, peak memory, GB", 2.5, False, "{:.2f}", of_runs("full", lambda run: run["peak_memory_gb"])),
    Target("full run of 40 epochs, AURC", 0.0055, False, "{:.5f}",
           of_runs("long", lambda run: run["two_stage"]["aurc"])),
    ratio_of_areas("AURC, times that of Stage 1's softmax", 0.75, "softmax"),
    ratio_of_areas("AUGRC, times that of Stage 1's softmax", 0.75, "softmax", "augrc"),
    ratio_of_areas("AURC, times that of the Stage 2 base network as verifier", 1.0, "stage2_base"),
    ratio_of_areas("AUGRC, times that of the Stage 2 base network as verifier", 1.0, "stage2_base", "augrc"),
    ratio_of_areas("AURC, times that of mirror-image averaging of Stage 1", 1.0, "mirror"),
    ratio_of_areas("AURC, times that of the same by its margin", 1.0, "mirror's margin"),
    ratio_of_areas("AUGRC, times that of the same by its margin", 1.0, "mirror's margin", "augrc"),
    ratio_of_areas("AURC, times that of the same by p-norm", 1.0, "mirror's p-norm"),
    ratio_of_areas("AURC, times that of the same by its margin, combined as ours", 1.0, "mirror's margin, combined"),
    ratio_of_areas("AURC, times that of a deep ensemble of 2", 1.0, "ensemble of 2"),
    ratio_of_areas("AUGRC, times that of a deep ensemble of 2", 1.0, "ensemble of 2", "augrc"),
    ratio_of_areas("AURC, times that of a deep ensemble of 2 by its margin", 1.0, "ensemble of 2, margin"),
    ratio_of_areas("AUGRC, times that of a deep ensemble of 2 by its margin", 1.0, "ensemble of 2, margin", "augrc"),
    ratio_of_areas("AURC, times that of a deep ensemble of 2 about our answers", 1.0, "ensemble of 2, our answers"),
    ratio_of_areas("AURC, times that of a deep ensemble of 5 (stretch, at a third of its multiply-adds: ours is 0.46)",
                   1.0, "ensemble of 5"),
    Target("AURC with the OOD rejection, times that of Stage 1's softmax", 0.75, False, "{:.3f}",
           both_reasons_against("softmax")),
    Target("AUROC of failure prediction", 0.945, True, "{:.1%}", of_ours("auroc_failure")),
    Target("FPR at 95 % TPR", 0.3, False, "{:.1%}", of_ours("fpr95")),
    Target("expected calibration error", 0.01, False, "{:.2%}", promised("calibration")),
    Target("calibration error of the worst predicted category", 0.03, False, "{:.2%}", promised("worst calibration"),
           each=True),
    Target("coverage certified for 1 % errors", 0.65, True, "{:.1%}", promised("certified coverage")),
    Target("AUROC of CIFAR-100's images by OOD score", 0.905, True, "{:.1%}", told_apart(("CIFAR-100",))),
    Target("AUROC of CIFAR-100's images by OOD score, less that by the softmax of a single view", 0.03, True, "{:+.1%}",
           told_apart(("CIFAR-100",), "softmax")),
    Target("AUROC of CIFAR-100's images by OOD score, less that by the softmax of two views", 0.03, True, "{:+.1%}",
           told_apart(("CIFAR-100",), "softmax, 2 views")),
    Target("AUROC of both kinds of noise, the less", 0.95, True, "{:.1%}",
           told_apart(("uniform noise", "Gaussian noise"))),
    Target("AUROC of MNIST (looked at when the OOD score took its form)", 0.95, True, "{:.1%}", told_apart(("MNIST",))),
    Target("the pretrained model: AUROC of CIFAR-100's images by OOD score", 0.905, True, "{:.1%}",
           told_apart(("CIFAR-100",), models="pretrained")),
    Target("the pretrained model: the same, less that by Stage 1's softmax, a single view", 0.03, True, "{:+.1%}",
           told_apart(("CIFAR-100",), "softmax", "pretrained")),
]  # fmt: skip


GLOSSARY = [
    "What the words mean:", "",
    "- *Stock Keras*: the same network of Keras' own layers, trained by plain `fit`. *Hand-written step*: our network",
    "  and optimizer in a bare loop, the limit of the framework.",
    "- *By multiply-adds*: divided by how many times Stage 1's multiply-adds a decision takes.",
    "- *Softmax, base network, mirror-image averaging, ensemble*: baselines; see the section of selective.py. In",
    "  the field's words: maximum softmax probability (MSP), test-time augmentation, deep ensembles.",
    "- *AURC*: accept the most confident image, then the next, and so on; the mean of the error rates on the way.",
    "- *AUGRC*: on the same way, the mean share of *all* images that are accepted and wrong.",
    "- *AUROC of failure prediction*: how often a correct answer has a higher confidence than a wrong one.",
    "- *FPR at 95 % TPR*: the share of incorrect answers accepted where 95 % of the correct ones are.",
    "- *Expected calibration error*: the mean gap between confidence and share of correct answers, in 15 equal groups.",
    "- *OOD score*: how little an image is like what the model knows, for out-of-distribution detection;",
    "  above its limit an image is OTHER.", "",
]  # fmt: skip


def row(target: Target, measured: Measured) -> list[str]:
    """Its row of the table; a target is reached if the median is, or each value, or an interval, as it asks."""
    bound = f"at {'least' if target.at_least else 'most'} {target.form.format(target.bound)}"
    try:
        values = target.values(measured)
    except KeyError:
        values = []
    if not values:
        return [target.what, bound, "not measured", ""]
    worst = min(values) if target.at_least else max(values)
    value = worst if target.each else statistics.median(values)
    reached = value >= target.bound if target.at_least else value <= target.bound
    reached = reached and not (target.below_one and max(values) >= 1)
    return [target.what, bound + ", each" * target.each, spread(values, target.form), "yes" if reached else "no"]


def table(measured: Measured) -> str:
    """The section of RESULTS.md."""
    rows = [row(one, measured) for one in TARGETS]
    lines = [
        "## Targets", "",
        "Written by `python benchmarks/targets.py` from the figures below. Median, in brackets minimum and maximum.",
        "Three targets were set for a processor with AMX: those against stock Keras in float32 and in bfloat16,",
        "measured on one, and the minutes of a full run, measured on one without. Behind ratios of AURC or AUGRC",
        "stands the 95 % interval, which has to lie below 1, too. The run of 40 epochs, one Stage 2 CNN of 50",
        "categories and the confidence against its baselines were measured with whole CNNs as Stage 2, all else",
        "with the default.", "",
        *markdown(["figure", "target", "measured", "reached"], rows),
        *GLOSSARY,
    ]  # fmt: skip
    return "\n".join(lines)


def read_measured() -> Measured:
    return Measured(read_json("speed", {}), read_json("quality", []), read_json("selective", {}), read_json("ood", {}))


def main() -> None:
    """Writes the section."""
    write_section("targets", table(read_measured()))


if __name__ == "__main__":
    main()
