"""The examples in the docstrings of what a user calls from Python."""

import doctest

import numpy as np
import pytest

import mscnn_helpers as mscnn

DOCUMENTED = {
    "load_model": mscnn.load_model, "decide": mscnn.MultiStageCNN.decide, "read_image": mscnn.read_image,
    "load_dataset": mscnn.load_dataset, "threshold_for_risk": mscnn.threshold_for_risk,
    "risk_coverage": mscnn.risk_coverage, "aurc": mscnn.aurc, "failure_metrics": mscnn.failure_metrics,
    "categories_from": mscnn.categories_from,
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_gives_what_it_says(name):
    found = doctest.DocTestFinder(recurse=False).find(DOCUMENTED[name], name, globs={**vars(mscnn), "np": np})
    (example,) = [one for one in found if one.examples]
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example).failed == 0
