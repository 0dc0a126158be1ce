"""The report as a file: offline, whole, the same every time, and honest about what is unknown."""

from __future__ import annotations

import base64
import io
import math
import re
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moecap_eval import compare, parse_config, read_records, run, write_report
from moecap_eval.report import figures, radar
from moecap_eval.report.html import render_report
from moecap_eval.report.numbers import byte_size, change, number, quantity, signed

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_runs import config_data

VOID = {
    "meta",
    "br",
    "hr",
    "img",
    "input",
    "link",
    "circle",
    "line",
    "path",
    "polygon",
    "use",
    "rect",
    "stop",
}
ARMS = {
    "plain": {"noise": 0.01, "latency_noise": 0.02},
    "slow": {"noise": 0.01, "latency_noise": 0.02, "slowdown": 1.5, "memory_gib": 1.0},
}


class Page(HTMLParser):
    """Collects tags, ids, references and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in {"style", "script"}:
            self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name)) is not None]


def make(folder: Path, arms: dict, **options) -> Path:
    run(parse_config(config_data(arms, items=64, blocks=8, **options)), folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("run"), ARMS)


@pytest.fixture(scope="module")
def page(finished: Path) -> Page:
    return Page(write_report(finished).read_text())


def test_cap16_no_external_reference(page, finished):
    targets = page.attributes("href") + page.attributes("src")
    assert targets
    assert all(target.startswith(("#", "data:application/gzip;base64,")) for target in targets)
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", (finished / "report.html").read_text())
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", text)
    assert not any(tag == "script" for tag, _ in page.tags)


def test_cap16_internal_links_and_ids_fit(page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    anchors = [target[1:] for target in page.attributes("href") if target.startswith("#")]
    assert set(anchors) <= set(ids)
    clips = re.findall(r"url\(#([^)]+)\)", " ".join(v for _, attrs in page.tags for v in attrs.values() if v))
    assert set(clips) <= set(ids)


def test_cap16_the_same_byte_for_byte(finished, tmp_path):
    first = write_report(finished, tmp_path / "a.html").read_bytes()
    second = write_report(finished / "records.jsonl", tmp_path / "b.html").read_bytes()
    assert first == second


def test_cap16_embedded_records_make_the_same_report(page, finished, tmp_path):
    (data,) = [href for href in page.attributes("href") if href.startswith("data:")]
    archive = io.BytesIO(base64.b64decode(data.partition(",")[2]))
    with tarfile.open(fileobj=archive, mode="r:gz") as tar:
        tar.extractall(tmp_path, filter="data")
    assert write_report(tmp_path).read_bytes() == (finished / "report.html").read_bytes()


def test_cap16_opens_with_the_verdict(page):
    text = " ".join(" ".join(page.text).split())
    assert text.index("2 configurations") < text.index("Keep plain") < text.index("one sentence each")
    assert "It has 0.25× the fast memory, but 32." in text
    assert "all 64 outputs are identical to the baseline's" in text
    for expected in (
        "Cost sheet",
        "Accuracy by task",
        "Pareto front",
        "block by block",
        "Environment",
        "config ",
    ):
        assert expected in text


def test_cap16_unknown_is_said_with_its_reason(page):
    text = " ".join(" ".join(page.text).split())
    assert "not measured: this axis is never measured" in text
    assert "No energy meter could be read; energy is priced as 50 W" in text


def test_cap16_reader_aids(page):
    tags = {tag for tag, _ in page.tags}
    assert {"main", "header", "nav", "h1", "h2", "table", "figure"} <= tags
    assert page.attributes("lang") == ["en"]
    regions = [attrs for _, attrs in page.tags if attrs.get("role") == "region"]
    assert regions
    assert all(attrs.get("aria-label") and attrs.get("tabindex") == "0" for attrs in regions)
    assert any(attrs.get("name") == "viewport" for tag, attrs in page.tags if tag == "meta")


def polygons(folder: Path) -> dict[str, str]:
    page = Page(render_report(read_records(folder), compare(folder)))
    return {
        attrs["data-arm"]: attrs["points"]
        for tag, attrs in page.tags
        if tag == "polygon" and "data-arm" in attrs
    }


def test_cap16_polygons_do_not_change_when_an_arm_is_added(finished, tmp_path):
    """Noise is seeded by arm and block, so the arms that both runs share measure the same."""
    more = make(tmp_path / "more", {**ARMS, "third": {"slowdown": 0.5}})
    before, after = polygons(finished), polygons(more)
    assert set(before) == {"plain", "slow"}
    assert set(after) == {"plain", "slow", "third"}
    assert before["plain"] == after["plain"]
    compared = compare(finished).row("throughput", "slow").estimate
    assert compare(more).row("throughput", "slow").estimate.n == compared.n


def test_cap16_one_arm_renders(tmp_path):
    text = write_report(make(tmp_path, {"plain": {}}, aa_control=False)).read_text()
    page = Page(text)
    assert "Only plain was measured" in " ".join(page.text)
    assert "nothing shows how much two runs of the same thing differ" in " ".join(" ".join(page.text).split())


def test_names_are_escaped(tmp_path):
    data = config_data({"plain": {}}, items=8, blocks=2)
    data["params"]["tasks"] = 1
    run(parse_config(data), tmp_path)
    path = tmp_path / "records.jsonl"
    path.write_text(
        path.read_text().replace("this axis is never measured", "<script>alert(1)</script> & more")
    )
    text = write_report(tmp_path).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in text


@pytest.mark.parametrize(
    ("improvement", "share"), [(1.0, 0.5), (8.0, 1.0), (1 / 8, 0.0), (2.0, 2 / 3), (64.0, 1.0), (1 / 64, 0.0)]
)
def test_cap16_radius(improvement, share):
    assert radar.radius(improvement) == pytest.approx(radar.RADIUS * share)


def test_cap16_polygon_geometry():
    shape = radar.polygon("x", 1, [1.0, 100.0, None, 1.0])
    (top, right, left) = shape.points
    assert top == pytest.approx((radar.CENTRE[0], radar.CENTRE[1] - radar.RADIUS / 2))
    assert right == pytest.approx((radar.CENTRE[0] + radar.RADIUS, radar.CENTRE[1]))
    assert left == pytest.approx((radar.CENTRE[0] - radar.RADIUS / 2, radar.CENTRE[1]))
    assert shape.clipped == (right,)
    assert math.dist(left, radar.CENTRE) == pytest.approx(radar.RADIUS / 2)


def test_pareto_front_by_enumeration():
    points = {"a": (1.0, 5.0), "b": (2.0, 6.0), "c": (3.0, 4.0), "d": (1.0, 4.0), "e": (2.0, 6.0)}
    assert figures.pareto_front(points, x_up=False, y_up=True) == ["a", "b", "e"]
    assert figures.pareto_front(points, x_up=True, y_up=True) == ["b", "c", "e"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (number(None), "not measured"),
        (number(0), "0"),
        (number(0.012345), "0.0123"),
        (number(12345.6), "12\u202f346"),
        (quantity(3.35e12, "B/s"), "3.35 TB/s"),
        (quantity(0.00643, "s"), "6.43 ms"),
        (quantity(2.5e-6, "s"), "2.50 µs"),
        (quantity(0.0, "s"), "0 s"),
        (quantity(61.5, "s"), "61.5 s"),
        (quantity(346.2, "token/s"), "346 token/s"),
        (byte_size(4 * 2**30), "4.00 GiB"),
        (byte_size(0), "0 B"),
        (change(1.24, "ratio"), "+24.0\u00a0%"),
        (change(0.76, "ratio"), "\u221224.0\u00a0%"),
        (change(2.0, "ratio"), "2.00×"),
        (change(-0.2, "difference"), "\u22120.200"),
        (signed(-0.0001, 3), "0.000"),
    ],
)
def test_numbers(text, expected):
    assert text == expected
