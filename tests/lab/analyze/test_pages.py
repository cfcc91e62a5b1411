"""Charts, heat maps and the page about one picture."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from corematching.errors import ConfigError, InputError
from corematching.lab.analyze import analyze_picture, build_picture_page, save_page
from corematching.lab.analyze.chart import Chart, Scale, label_ticks, span, thin, write_number
from corematching.lab.analyze.heat import (
    encode_heat,
    encode_picture,
    lay_out,
    trace_dropped,
    trace_outline,
)
from corematching.lab.analyze.picture import find_grid
from tests.lab.analyze.pages import check_page
from tests.lab.analyze.test_study import RULES

QUESTION = 'Is "a < b" & <b>bold</b>?'


@pytest.fixture(scope="module")
def analysis(subject):
    done = []
    found = analyze_picture(
        subject, Image.new("RGB", (64, 64), "red"), QUESTION, RULES, progress=done.append
    )
    assert done == list(range(found.num_layers))
    return found


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_page_is_whole_and_alone(analysis):
    analysis.answers = {"Answer": "<script>alert(1)</script>"}
    page = build_picture_page(analysis, "corematching analyze --out=x.html")
    checker = check_page(page)
    text = "".join(checker.text)
    assert QUESTION in text and "<script>alert(1)</script>" in text
    assert "corematching analyze --out=x.html" in text
    panels = [name for name in checker.ids if name.startswith("layer")]
    assert panels == [f"layer{layer}" for layer in range(analysis.num_layers)]
    assert page.count('type="radio"') == analysis.num_layers and page.count(" checked") == 1
    assert page.count("ρ = ") == 6 * analysis.num_layers


def test_figures_are_json_and_say_the_same(analysis):
    told = analysis.to_dict()
    assert told["grid"] == [4, 4] and told["image_tokens"] == 16
    assert len(told["layers"]) == analysis.num_layers
    scored = analysis.layers[1].rules["paper"]
    assert told["layers"][1]["rules"]["paper"]["above_knee"] == scored.kept.sum()


def test_tokens_without_a_grid_lie_in_rows(analysis):
    page = build_picture_page(replace(analysis, grid=None))
    checker = check_page(page)
    assert "picture" not in checker.ids and "form no single grid" in "".join(checker.text)


def test_chosen_layers_only(subject):
    picture = Image.new("RGB", (64, 64), "blue")
    found = analyze_picture(subject, picture, "Why?", RULES, layers=[0])
    assert [f.layer for f in found.layers] == [0]
    checker = check_page(build_picture_page(found))
    assert [name for name in checker.ids if name.startswith("layer")] == ["layer0"]


def test_bad_input_names_the_fix(subject):
    picture = Image.new("RGB", (64, 64))
    with pytest.raises(InputError, match="the question is empty"):
        analyze_picture(subject, picture, "  ", RULES)
    with pytest.raises(ConfigError, match="the model has the layers"):
        analyze_picture(subject, picture, "Why?", RULES, layers=[77])


def test_a_page_that_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="give another path"):
        save_page(tmp_path, "x")


def test_grid_of_the_picture():
    class Processor:
        class image_processor:  # noqa: N801
            merge_size = 2

    assert find_grid({}, Processor, 16) == (4, 4)
    assert find_grid({}, Processor, 15) is None
    assert find_grid({}, Processor, 16, square=False) is None
    assert find_grid({"image_grid_thw": [[1, 4, 12]]}, Processor, 12, square=False) == (2, 6)
    assert find_grid({"image_grid_thw": [[1, 4, 12]]}, Processor, 24) is None


def test_heat_map_has_one_pixel_per_patch():
    picture = decode(encode_heat(np.array([0.0, 1.0, 2.0]), (2, 2)))
    assert picture.size == (2, 2) and picture.mode == "RGBA"
    low, high, empty = (picture.getpixel(place) for place in ((0, 0), (0, 1), (1, 1)))
    assert sum(high[:3]) > sum(low[:3]) and empty[3] == 0
    flat = decode(encode_heat(np.ones(4), (2, 2)))
    assert len(set(flat.getdata())) == 1


def test_large_pictures_are_made_smaller():
    assert max(decode(encode_picture(Image.new("RGB", (2000, 1000)))).size) == 640
    assert decode(encode_picture(Image.new("L", (30, 20)))).size == (30, 20)


def test_outline_and_dropped_area():
    kept = np.array([True, True, False, False])
    assert set(trace_outline(kept, (2, 2)).split("M")[1:]) == {
        "0 0h1", "1 0h1", "0 1h1", "1 1h1", "0 0v1", "2 0v1",
    }  # fmt: skip
    assert trace_dropped(kept, (2, 2)) == "M0 1h1v1h-1zM1 1h1v1h-1z"
    assert trace_dropped(np.array([True]), (1, 2)) == ""


def test_layout_without_a_picture():
    assert lay_out(16, (4, 4)) == (4, 4)
    assert lay_out(70, None) == (3, 32) and lay_out(5, None) == (1, 5)


def test_scales():
    assert Scale(0, 10, 100, 200)(2.5) == 125
    assert Scale(0, 10, 200, 100)(2.5) == 175
    assert Scale(3, 3, 0, 10)(3) == 5
    root = Scale(-4, 4, 0, 100, power=0.5)
    assert [root(-4), root(0), root(1), root(4)] == [0, 50, 75, 100]


def test_chart_is_svg():
    chart = Chart((0, 4), (0, 1), "x & y", "share", percent=True)
    chart.line([0, 1, 2, 3], [0.5, None, 0.25, 1.0], "ours")
    chart.band([0, 1], [0.1, 0.2], [0.3, 0.4], "ours")
    chart.dots([1, 2], [0.1, 0.9], "gone")
    chart.mark_x(4, "plain", "<end>")
    chart.mark_y(0.5, "plain")
    chart.hints([0, 1], [0.5, None], ["layer 0", ""])
    root = ET.fromstring(chart.render('a "chart"'))
    assert root.get("aria-label") == 'a "chart"'
    paths = {path.get("class"): path.get("d") for path in root.iter("path")}
    assert paths["line ours"].count("M") == 2 and paths["dots gone"].count("h0") == 2
    assert len(list(root.iter("circle"))) == 1
    words = [text.text for text in root.iter("text")]
    assert {"x & y", "<end>", "50 %", "100 %"} <= set(words)


def test_ticks_and_numbers():
    assert label_ticks(0, 1, percent=True)[0] == (0.0, "0 %")
    assert [text for _, text in label_ticks(-1, 1)] == ["−1", "−0.5", "0", "0.5", "1"]
    assert write_number(0.00025) == "2.5e−4" and write_number(-3.0) == "−3"


def test_range_and_thinning():
    assert span([0, 10], margin=0.1) == (-1, 11)
    assert span([5, 5], margin=0.1) == (4.5, 5.5) and span([0]) == (-1, 1)
    points = thin(np.arange(10).reshape(5, 2), most=3)
    assert points[:, 0].tolist() == [0, 4, 8]
