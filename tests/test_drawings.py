"""The drawings of the lessons."""

import re
from xml.etree import ElementTree

import pytest
from conftest import ROOT

import mscnn_helpers as mscnn
from mscnn_parts.networks import STAGE1_WIDTHS

DRAWINGS = sorted((ROOT / "notebooks/images").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("path", DRAWINGS, ids=lambda path: path.stem)
def test_a_drawing_says_what_it_shows_and_needs_nothing_else(path):
    text = path.read_text("utf-8")
    root = ElementTree.fromstring(text)
    assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
    assert not re.findall(r"https?://(?!www.w3.org/)", text)
    assert len(text) < 120_000
    lessons = "".join(page.read_text("utf-8") for page in (ROOT / "notebooks").glob("*.ipynb"))
    assert f"(images/{path.name})" in lessons


def test_the_drawn_network_is_the_one_that_is_built():
    cnn = mscnn.build_cnn("stage1", (32, 32, 3), 10, STAGE1_WIDTHS, [0] * 3, [1] * 3, True, "float32")
    drawn = (ROOT / "notebooks/images/stage1_network.svg").read_text("utf-8")
    for name in ("whitened", "block1", "block2", "block3", "pooled", "logits"):
        shape = " × ".join(map(str, cnn.get_layer(name).output.shape[1:]))
        assert f">{shape}<" in drawn, name
