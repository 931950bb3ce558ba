"""The HTML report: what it embeds, what it escapes, what it refuses."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import av
import numpy as np
import pytest
from PIL import Image

from diffmae_video.rendering.figures import MAX_POINTS
from diffmae_video.rendering.report import Report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects tags with their attributes, checks that they nest, and keeps the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def find(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def curve(text: str, index: int = 0) -> list[tuple[float, float]]:
    """Points of a drawn curve in the picture's units."""
    path = re.search(rf'id="curve-{index}">\s*<path d="([^"]*)"', text)[1]
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]


def small_video() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def full_report(tmp_path) -> Report:
    report = Report("Title")
    report.text("A **bold** word and `code`.\n\n- first\n- second")
    report.curves("Loss", {"train": ([1, 2, 3], [3.0, 2.0, 1.0]), "val": ([1, 3], [3.5, 1.5])}, y_label="error")
    report.table("Numbers", ["model", "top-1"], [["scratch", 12.3456], ["DiffMAE", None]], note="a note")
    report.image("Array", np.zeros((4, 6, 3), np.uint8))
    report.settings("[train]\nsteps = 3\n")
    (tmp_path / "clip.mp4").write_bytes(small_video())
    report.video("Clip", tmp_path / "clip.mp4")
    return report


def test_page_is_whole_and_asks_for_nothing(tmp_path):
    text = full_report(tmp_path).html()
    page = Page(text)
    for _, attributes in page.tags:
        for name in ("src", "href", "data", "poster", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in text
    assert 'href="#' not in text
    assert "@import" not in text
    assert not page.find("script")
    assert not page.find("link")
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.find("meta"))
    assert "prefers-color-scheme:dark" in text


def test_every_text_is_escaped():
    attack = "<script>alert('x')</script>\"><img src=http://x onerror=y>&\udcff"
    report = Report(attack)
    report.text(f"{attack}\n\n- {attack}\n\n**{attack}** `{attack}`")
    report.table(attack, [attack], [[attack]], note=attack)
    report.curves(attack, {attack: ([1, 2], [1, 2])}, x_label=attack, y_label=attack, note=attack)
    report.image(attack, np.zeros((2, 2), np.uint8), note=attack)
    report.settings(attack, title=attack)
    page = Page(report.html())
    assert not page.find("script")
    assert len(page.find("img")) == 1
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert "".join(page.words).count("alert('x')") >= 10


def test_pictures_and_videos_come_back_bit_for_bit(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    video = small_video()
    report = Report("Media")
    report.image("Array", picture)
    report.video("Clip", video)
    page = Page(report.html())
    head, _, data = page.find("img")[0]["src"].partition(",")
    assert head == "data:image/png;base64"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), picture)
    head, _, data = page.find("video")[0]["src"].partition(",")
    assert head == "data:video/mp4;base64"
    assert base64.b64decode(data) == video


def test_a_gif_is_a_picture():
    buffer = io.BytesIO()
    Image.new("L", (2, 2)).save(buffer, format="GIF")
    report = Report("Media")
    report.video("Loop", buffer.getvalue())
    assert Page(report.html()).find("img")[0]["src"].startswith("data:image/gif;base64,")


def test_curves_map_values_to_the_plot_area():
    report = Report("Curves")
    report.curves("Line", {"a": ([0, 5, 10], [0.0, 0.5, 1.0])})
    points = curve(report.html())
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert y0 > y1 > y2  # SVG counts downwards
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)


def test_logarithmic_curves_are_straight_for_exponentials():
    report = Report("Curves")
    report.curves("Line", {"a": ([0, 1, 2, 3], [1.0, 0.1, 0.01, -1.0])}, log_y=True)
    points = curve(report.html())
    assert len(points) == 3
    assert points[1][1] == pytest.approx((points[0][1] + points[2][1]) / 2, abs=0.1)


@pytest.mark.parametrize(
    ("x", "y"), [([], []), ([1], [float("nan")]), ([1, 2], [float("inf"), float("nan")])], ids=["empty", "nan", "inf"]
)
def test_curves_without_values_say_so(x, y):
    report = Report("Curves")
    report.curves("Nothing", {"a": (x, y)})
    page = Page(report.html())
    assert "No values yet." in page.words
    assert not page.find("svg")


@pytest.mark.parametrize("value", [0.0, 7.0, 1e-12, -3e9])
def test_constant_and_single_values_are_drawn(value):
    report = Report("Curves")
    report.curves("One", {"point": ([3], [value]), "flat": ([1, 2], [value, value])})
    text = report.html()
    assert Page(text).find("svg")
    point, other = curve(text, 0)  # a line without length, whose round ends make a dot
    assert point == other
    assert "stroke-linecap: round" in re.search(r'id="curve-0">.*?</g>', text, re.DOTALL)[0]
    assert len(curve(text, 1)) == 2
    assert np.isfinite([point, *curve(text, 1)]).all()


def test_long_curves_are_thinned_and_keep_their_mean_and_end():
    y = np.random.default_rng(0).standard_normal(10_000)
    y[-1] = 9.0
    report = Report("Curves")
    report.curves("Long", {"a": (np.arange(10_000), y)})
    page = Page(report.html())
    assert len(curve(report.html())) == MAX_POINTS
    assert any("a: 9 at the end" in word for word in page.words)


def test_write_replaces_the_file_whole_and_leaves_no_rest(tmp_path):
    target = tmp_path / "deep" / "report.html"
    full_report(tmp_path).write(target)
    first = target.read_text(encoding="utf-8")
    assert first == full_report(tmp_path).html()
    target.chmod(0o444)
    assert Report("Second").write(target) == target
    assert "Second" in target.read_text(encoding="utf-8")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_wrong_input_is_refused():
    report = Report("Wrong")
    with pytest.raises(ValueError, match="cells"):
        report.table("Table", ["a", "b"], [[1]])
    with pytest.raises(ValueError, match="one length"):
        report.curves("Curve", {"a": ([1, 2], [1])})
    with pytest.raises(ValueError, match="uint8"):
        report.image("Float", np.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match="image/png"):
        report.image("Text", b"<svg onload=alert(1)>")
    with pytest.raises(ValueError, match="video/mp4"):
        report.video("Text", b"#EXTM3U\nfile:///etc/passwd")
