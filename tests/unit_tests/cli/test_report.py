"""The page of `torchtitan report`: parsed, its curves read back from the picture, and, where it can be, shown."""

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html import unescape
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from torchtitan.cli import report
from torchtitan.cli.chart import MOST_POINTS, Curve, draw, thin
from torchtitan.cli.main import main
from torchtitan.cli.runs import LOSS, VALIDATION_LOSS, read_run
from torchtitan.config import JobConfig
from torchtitan.config.manager import write_resolved

SVG = "{http://www.w3.org/2000/svg}"
BROWSER = next(filter(None, map(shutil.which, ("google-chrome", "chromium", "chromium-browser"))), None)


def step(number: int, loss: float = 1.0, **values: float) -> dict[str, float]:
    defaults = {"grad_norm": 1.0, "lr": 1e-3, "throughput(tps)": 1000.0, "time_metrics/data_loading(%)": 0.5}
    defaults["time_metrics/validation(%)"] = 0.0
    memory = {"memory/max_reserved(GiB)": 20.0, "memory/max_reserved(%)": 25.0}
    return {"step": number, "time": 100.0 + number, LOSS: loss, **defaults, **memory, **values}


def validation(number: int, loss: float) -> dict[str, float]:
    return {"step": number, "time": 100.5 + number, VALIDATION_LOSS: loss}


def event(name: str, number: int, **facts: Any) -> dict[str, Any]:
    return {"event": name, "step": number, "time": 1e9, **facts}


def write_run(folder: Path, lines: list[dict[str, float]], events: Any = (), **training: Any) -> Path:
    config = JobConfig()
    for name, value in training.items():
        setattr(config.training, name, value)
    write_resolved(config, folder / "config.toml")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in events))
    return folder


def killed_and_resumed(folder: Path) -> Path:
    """Killed in step 5, went on from the checkpoint of step 2, stopped after step 4 and went on to 6."""
    lines = [step(n, loss=8.0 - n) for n in (1, 2, 3, 4)]
    lines[3:3] = [validation(3, 6.0)]
    lines += [step(n, loss=8.5 - n) for n in (3, 4, 5, 6)]
    lines[7:7] = [validation(4, 5.0)]
    lines[8]["time_metrics/validation(%)"] = 12.0
    start: dict[str, Any] = {"device": "NVIDIA H100", "commit": "abc123", "layout": "dp_shard 2"}
    events = [
        event("start", 0, **start),
        event("start", 2, **start),
        event("stop", 4, saved=True),
        event("start", 4, **start | {"commit": "def456"}),
        event("text", 4, prompt="def <", text="x>\x1b()"),
        event("end", 6, failed=False),
    ]
    return write_run(folder, lines, events, steps=6)


def parse(page: str) -> ET.Element:
    assert page.startswith("<!DOCTYPE html>\n")
    assert not re.search(r"""(src|href)=|url\(|@import|<script""", page), "the page needs nothing but itself"
    return ET.fromstring(page.partition("\n")[2])


def figures(page: ET.Element) -> dict[str, ET.Element]:
    return {
        "".join(figure.find("figcaption").itertext()): figure.find(f"{SVG}svg")  # type: ignore[union-attr, misc]
        for figure in page.iter("figure")
    }


def read_curve(svg: ET.Element, kind: str = "line", index: int = 0) -> list[tuple[float, float]]:
    """The values of a curve, by what is written at the axes."""
    axes = []
    for axis, place in (("x", "x"), ("y", "y")):
        ticks = [text for text in svg.iter(f"{SVG}text") if text.get("class") == axis]
        known = [
            (float(text.get(place) or 0) - 4 * (axis == "y"), float(str(text.text).replace(",", ""))) for text in ticks
        ]
        (p0, v0), (p1, v1) = known[0], known[-1]
        axes.append((p0, v0, (v1 - v0) / (p1 - p0)))
    lines = [line for line in svg.iter(f"{SVG}polyline") if kind in str(line.get("class")).split()]
    places = [pair.split(",") for pair in str(lines[index].get("points")).split()]
    return [
        tuple(v0 + (float(place) - p0) * slope for place, (p0, v0, slope) in zip(pair, axes, strict=True))  # type: ignore[misc]
        for pair in places
    ]


def rows(page: ET.Element) -> list[list[str]]:
    return [["".join(cell.itertext()) for cell in row] for row in page.iter("tr")]


def test_a_killed_and_resumed_run_is_drawn_with_what_it_lost(tmp_path: Path) -> None:
    assert main(["report", str(killed_and_resumed(tmp_path / "run"))]) == 0
    page = parse((tmp_path / "run/report.html").read_text())
    loss = figures(page)["Loss, and on held-out data (circles)"]
    expected = [(1, 7.0), (2, 6.0), (3, 5.5), (4, 4.5), (5, 3.5), (6, 2.5)]
    for (x, y), point in zip(read_curve(loss), expected, strict=True):
        assert (x, y) == pytest.approx(point, abs=0.02)
    for (x, y), point in zip(read_curve(loss, "lost"), [(3, 5.0), (4, 4.0)], strict=True):
        assert (x, y) == pytest.approx(point, abs=0.02)
    # the validation of step 3 was before the kill, and is not repeated in this run
    assert read_curve(loss, "dots") == [pytest.approx((4, 5.0), abs=0.02)]
    shares = read_curve(figures(page)["Validation, % of all time"])
    assert [y for _, y in shares] == pytest.approx([0, 0, 0, 0, 12, 0], abs=0.05)
    marks = ["".join(line.itertext()) for line in loss.iter(f"{SVG}line") if line.get("class") == "mark"]
    name = tmp_path / "run"
    assert f"{name}: went on after step 2" in marks
    assert f"{name}: stopped by SIGTERM after step 4; saved" in marks
    happened = [row[-1] for row in rows(page) if len(row) == 3]
    assert happened[1:] == [
        "started",
        "ended without a word: killed, or its machine was",
        "went on after step 2",
        "stopped by SIGTERM after step 4; saved",
        "went on after step 4",
        "ended after step 6",
    ]
    assert ["commit", "def456"] in rows(page)
    assert ["training.steps", "6"] in rows(page) and ["training.max_norm", "1"] in rows(page)
    assert [text.text for text in page.iter("b")] == ["def <"]
    assert "x>\N{REPLACEMENT CHARACTER}()" in "".join(page.itertext())


def test_memory_is_drawn_against_that_of_the_device(tmp_path: Path) -> None:
    page = parse(report.to_html([read_run(killed_and_resumed(tmp_path / "run"))]))
    svg = figures(page)["Peak memory, GiB, of all that the device has (dashed)"]
    assert [y for _, y in read_curve(svg)] == pytest.approx([20] * 6, abs=0.5)
    assert [y for _, y in read_curve(svg, "dots")] == pytest.approx([80] * 2, abs=0.5)


def test_several_runs_are_laid_over_each_other_with_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "out/a", [step(n, loss=5.0, **{"mfu(%)": 40.0}) for n in (1, 2, 3)], seq_len=64)
    write_run(tmp_path / "out/b", [step(n, loss=5.0 - n / 8) for n in (2, 3, 4)], seq_len=128)
    assert main(["report", str(tmp_path / "out"), "--output", str(tmp_path / "both.html")]) == 0
    page = parse((tmp_path / "both.html").read_text())
    drawn = figures(page)
    assert [y for _, y in read_curve(drawn["Loss"], index=1)] == pytest.approx([4.75, 4.625, 4.5], abs=0.01)
    assert [y for _, y in read_curve(drawn["Difference in loss from the first run"])] == pytest.approx(
        [0.25, 0.375], abs=0.01
    )
    colors = {line.get("stroke") for line in drawn["Loss"].iter(f"{SVG}polyline")}
    assert len(colors) == 2
    table = rows(page)
    assert [str(tmp_path / "out/b"), "loss", "0.375", "3", "2"] in table
    assert table.count(["training.seq_len", "64", "128"]) == 2
    assert ["MFU, %", "40.00", ""] in table


def test_a_long_curve_keeps_its_extremes(tmp_path: Path) -> None:
    points = [(float(n), 2.0) for n in range(50_000)]
    points[12_345] = (12_345.0, 9.0)
    points[30_001] = (30_001.0, -1.0)
    kept = thin(points)
    assert len(kept) <= MOST_POINTS + 2 and kept == sorted(kept)
    assert {points[12_345], points[30_001]} <= {*kept}


@pytest.mark.parametrize(
    "values", [[0.0], [1e-12, 1e6], [-5.0, -5.0], [3.0, float("nan"), float("inf")], [1e-300, 1.0]]
)
def test_any_values_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    lines = [step(n, loss=value, grad_norm=abs(value), lr=value) for n, value in enumerate(values, start=1)]
    page = parse(report.to_html([read_run(write_run(tmp_path, lines))]))
    for svg in figures(page).values():
        for line in svg.iter(f"{SVG}polyline"):
            places = [float(number) for pair in str(line.get("points")).split() for number in pair.split(",")]
            assert all(-1 <= place <= 561 for place in places)


def test_nothing_to_draw_is_no_chart() -> None:
    assert draw([Curve("a", [], "red")]) == ""


def test_of_a_step_that_ran_twice_the_last_counts(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [step(1, 5.0), step(2, 4.0), step(1, 5.0), step(2, 3.5)]))
    assert run.curve(LOSS) == [(1, 5.0), (2, 3.5)]


def test_a_later_start_in_the_same_folder_is_the_run(tmp_path: Path) -> None:
    """It began again at step 1 and ended sooner, or went on from a checkpoint before the last steps."""
    first = [step(1, 5.0), step(2, 4.0), step(3, 3.0), step(4, 2.0)]
    for later, expected in (({1: 7.0, 2: 6.0}, {1: 7.0, 2: 6.0}), ({3: 6.0}, {1: 5.0, 2: 4.0, 3: 6.0})):
        run = read_run(write_run(tmp_path, [*first, *(step(n, loss) for n, loss in later.items())]))
        assert dict(run.curve(LOSS)) == expected


def test_cut_lines_are_skipped(tmp_path: Path) -> None:
    path = write_run(tmp_path, [step(1, 5.0), step(2, 4.0)]) / "metrics.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, others[0][:30], *others, first[:20]]))
    assert read_run(tmp_path).curve(LOSS) == [(1, 5.0), (2, 4.0)]


def test_the_metrics_of_all_ranks_have_the_options_of_their_run(tmp_path: Path) -> None:
    write_run(tmp_path, [], seq_len=64)
    for rank in (0, 1):
        (tmp_path / f"rank_{rank}").mkdir()
        (tmp_path / f"rank_{rank}/metrics.jsonl").write_text(json.dumps(step(1)) + "\n")
    (tmp_path / "metrics.jsonl").unlink()
    runs = report.find_runs([tmp_path])
    assert [run.name for run in runs] == [str(tmp_path / "rank_0"), str(tmp_path / "rank_1")]
    assert all(run.options["training.seq_len"] == 64 for run in runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere/metrics.jsonl does not exist; expected the output folder of a run"),
        (["run", "--output", "run/metrics.jsonl/x.html"], "cannot be written: File exists; name another place"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", [step(1)])
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


MEASURE = """<script>
const rect = (element) => { const r = element.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] };
const charts = [...document.querySelectorAll("figure")].map((figure) => ({
  caption: figure.querySelector("figcaption").innerText,
  box: rect(figure.querySelector("svg")),
  curves: [...figure.querySelectorAll("polyline")].map(rect),
  texts: [...figure.querySelectorAll("text")].map(rect),
}));
const widest = document.documentElement.scrollWidth;
const found = document.createElement("pre");
found.hidden = true;
found.textContent = JSON.stringify({charts, widest, text: document.body.innerText});
document.body.append(found);
</script>"""


def browse(page: Path, picture: Path, *flags: str) -> str:
    """What the browser has made of a page, and its picture."""
    profile = f"--user-data-dir={picture.with_suffix('.profile')}"
    off = ("gpu", "quic", "background-networking", "component-update", "sync")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    command += [profile, "--window-size=1250,1900", f"--screenshot={picture}", "--dump-dom", *flags, page.as_uri()]
    return subprocess.run(command, check=True, timeout=120, capture_output=True, text=True).stdout


@pytest.mark.skipif(BROWSER is None, reason="there is no browser here")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    """Text and curves are where they belong; the pictures stay in the folder that TEST_PICTURES names, or pytest's."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    runs = [read_run(killed_and_resumed(tmp_path / "run"))]
    report.write(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "measured.html").write_text(page.replace("</body>", f"{MEASURE}</body>"))
    pictures = Path(os.environ.get("TEST_PICTURES", tmp_path))
    pictures.mkdir(parents=True, exist_ok=True)

    shown = {
        theme: browse(tmp_path / "measured.html", pictures / f"report-{theme}.png", f"--blink-settings={setting}")
        for theme, setting in (("light", "preferredColorScheme=1"), ("dark", "preferredColorScheme=0"))
    }
    found = json.loads(unescape(re.findall('<pre hidden="">({.*})</pre>', shown["light"])[0]))
    assert found["widest"] <= 1250
    assert all(words in found["text"] for words in ("went on after step 2", "ended after step 6", "commit", "def456"))
    assert [chart["caption"] for chart in found["charts"]] == [*figures(parse(page))]
    for chart in found["charts"]:
        left, top, right, bottom = chart["box"]
        assert right - left > 400
        for box in (*chart["curves"], *chart["texts"]):
            assert left <= box[0] <= box[2] <= right + 3 and top <= box[1] <= box[3] <= bottom + 3, chart
        assert chart["curves"] and max(box[2] - box[0] for box in chart["curves"]) > 0.8 * (right - left) - 60
        for a, b in combinations(chart["texts"], 2):
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1], "labels do not cover each other"

    light, dark = (imread(pictures / f"report-{theme}.png")[..., :3] for theme in ("light", "dark"))
    assert light[0, 0].mean() == 1 and dark[0, 0].mean() < 0.2
    for chart in found["charts"]:
        left, top, right, bottom = map(round, chart["box"])
        drawn = light[top:bottom, left:right]
        assert (abs(drawn - to_rgb(report.COLORS[0])).max(-1) < 0.02).sum() > 100, chart["caption"]
