"""A picture of a run: one HTML file that needs nothing else, of what the run has left in its output folder.

    torchtitan report outputs/                        # writes outputs/report.html
    torchtitan report outputs/monday outputs/tuesday --output both.html

Several runs are drawn over each other, with the differences from the first one, and with what differs in their options.
A folder without a run stands for the runs in the folders right below it.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from torchtitan.cli.chart import Curve, Mark, Point, draw, to_text
from torchtitan.cli.runs import (
    DATA,
    GRAD_NORM,
    LOSS,
    LR,
    MEMORY,
    MEMORY_PCT,
    MFU,
    SPEED,
    VALIDATION,
    VALIDATION_LOSS,
    Difference,
    Run,
    RunError,
    find_runs,
    to_curve,
)

COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
STYLE = Path(__file__).with_name("report.css")


def to_html(runs: Sequence[Run]) -> str:
    """The page; well-formed XML, and text as it is."""
    title = runs[0].options.get("job.description", "A run") if len(runs) == 1 else f"{len(runs)} runs"
    parts = [
        f"<h1>{escape(str(title))}</h1>",
        _key(runs),
        f'<div class="charts">{"".join(_charts(runs))}</div>',
        *_section("In short", _summary(runs)),
        *(_section("Differences from the first run", _differences(runs)) if len(runs) > 1 else ()),
        *_section("What happened", _course(runs)),
        *_section("Texts", _texts(runs)),
        *_section("Where it ran", _by_run(runs, lambda run: run.environment)),
        *_section("Options that are not the defaults", _by_run(runs, lambda run: run.options)),
        *_folded("All others", _by_run(runs, lambda run: run.defaults)),
    ]
    style = STYLE.read_text(encoding="utf-8").strip()
    head = f'<meta charset="utf-8"/><title>{escape(str(title))}</title><style>{style}</style>'
    return f"<!DOCTYPE html>\n<html><head>{head}</head><body>\n" + "\n".join(parts) + "\n</body></html>\n"


def write(runs: Sequence[Run], path: Path) -> None:
    """Raises RunError: the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_html(runs), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}; name another place") from None


def _charts(runs: Sequence[Run]) -> Iterator[str]:
    colored = list(zip(runs, _colors(runs), strict=True))
    marks = [mark for run, color in colored for mark in _marks(run, color)]

    def curves(key: str) -> Iterator[Curve]:
        for run, color in colored:
            yield from (Curve(f"{run.name}, trained again", to_curve(lost, key), color, "lost") for lost in run.lost)
            # one that the others may hide is wider than they
            yield Curve(run.name, run.curve(key), color, "line under" if run is not runs[-1] else "line")

    validation = [
        Curve(f"{run.name}, validation", to_curve(run.validations, VALIDATION_LOSS), color, "dots")
        for run, color in colored
    ]
    has_validation = any(curve.points for curve in validation)
    name = "Loss, and on held-out data (circles)" if has_validation else "Loss"
    yield _figure(name, draw([*curves(LOSS), *validation], marks=marks))
    yield _figure("Gradient norm, before clipping", draw(list(curves(GRAD_NORM)), marks=marks, may_be_log=True))
    yield _figure("Learning rate", draw(list(curves(LR)), marks=marks, from_zero=True))
    yield _figure("Tokens per second and device", draw(list(curves(SPEED)), marks=marks, from_zero=True))
    yield _figure("MFU, %: share of the device's peak", draw(list(curves(MFU)), marks=marks, from_zero=True))
    capacity = [
        Curve(f"{run.name}, all of the device's", _capacity(run), color, "dots")
        for run, color in colored
        if run.environment.get("device", "CPU") != "CPU"
    ]
    name = "Peak memory, GiB, of all that the device has (dashed)" if capacity else "Peak memory, GiB"
    yield _figure(name, draw([*curves(MEMORY), *capacity], marks=marks, from_zero=True))
    yield _figure("Waiting for data, % of a step", draw(list(curves(DATA)), marks=marks, from_zero=True))
    if any(share for run in runs for _, share in run.curve(VALIDATION)):
        yield _figure("Validation, % of all time", draw(list(curves(VALIDATION)), marks=marks, from_zero=True))
    for what, key in (("loss", LOSS), ("gradient norm", GRAD_NORM)):
        differences = [
            Curve(f"{run.name} - {runs[0].name}", list(Difference.of(what, key, runs[0], run).by_step.items()), color)
            for run, color in colored[1:]
            if run.steps.keys() & runs[0].steps.keys()
        ]
        yield _figure(f"Difference in {what} from the first run", draw(differences, may_be_log=True))


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>\n" if svg else ""


def _capacity(run: Run) -> list[Point]:
    """The device's memory at the first and the last step, from what a step says in GiB and in percent."""
    places = [
        (step, 100 * values[MEMORY] / values[MEMORY_PCT])
        for step, values in sorted(run.steps.items())
        if values.get(MEMORY_PCT)
    ]
    return [places[0], places[-1]] if places else []


def _marks(run: Run, color: str) -> Iterator[Mark]:
    for event in run.events:
        if event["event"] != "text" and 0 < event["step"] < max(run.steps):
            yield Mark(event["step"], f"{run.name}: {_describe(event)}", color)


def _describe(event: dict[str, Any]) -> str:
    step = event["step"]
    match event["event"]:
        case "start":
            return f"went on after step {step}" if step else "started"
        case "stop":
            return f"stopped by SIGTERM after step {step}; {'saved' if event.get('saved') else 'not saved'}"
        case "end":
            return f"failed at step {step}" if event.get("failed") else f"ended after step {step}"
    return f"{event['event']} at step {step}"


def _course(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        events = [event for event in run.events if event["event"] != "text"]
        for before, event in pairwise([{"event": ""}, *events]):
            if event["event"] == "start" and before["event"] == "start":
                rows.append([run.name, "", "ended without a word: killed, or its machine was"])
            rows.append([run.name, _clock(event.get("time", 0)), _describe(event)])
    return _table(["run", "when", "what"], rows)


def _texts(runs: Sequence[Run]) -> str:
    """What was written at validations, the newest first."""
    rows = [
        f"<p>{_clean(run.name)}, step {event['step']}</p>"
        f"<pre><b>{_clean(event['prompt'])}</b>{_clean(event['text'])}</pre>"
        for run in runs
        for event in reversed(run.events)
        if event["event"] == "text"
    ]
    newest, older = rows[:8], rows[8:]
    return "".join([*newest, *_folded(f"{len(older)} earlier ones", "".join(older))])


def _summary(runs: Sequence[Run]) -> str:
    rows = [[label, *(get(run) for run in runs)] for label, get in summary_rows()]
    return _table(["", *(run.name for run in runs)], [row for row in rows if any(row[1:])])


def summary_rows() -> list[tuple[str, Callable[[Run], str]]]:
    """What is said of each run beside its curves."""

    def last_validation(run: Run) -> str:
        return f"{run.validations[max(run.validations)][VALIDATION_LOSS]:.4f}" if run.validations else ""

    def mfu(run: Run) -> str:
        values = [value for _, value in run.curve(MFU)]
        return f"{sorted(values)[len(values) // 2]:.2f}" if values else ""

    return [
        ("logged steps", lambda run: f"{len(run.steps)}"),
        ("first loss", lambda run: f"{run.steps[min(run.steps)][LOSS]:.4f}"),
        ("last loss", lambda run: f"{run.steps[max(run.steps)][LOSS]:.4f}"),
        ("validation loss", last_validation),
        ("tokens/s a device", lambda run: f"{run.tokens_per_second:,.0f}"),
        ("MFU, %", mfu),
        ("peak memory, GiB", lambda run: f"{run.memory_gib:.2f}"),
    ]


def _differences(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs[1:]:
        if not run.steps.keys() & runs[0].steps.keys():
            rows.append([run.name, "no logged step in common", "", "", "0"])
            continue
        for what, key in (("loss", LOSS), ("gradient norm", GRAD_NORM)):
            found = Difference.of(what, key, runs[0], run)
            rows.append([run.name, what, f"{found.largest:.3g}", str(found.worst_step), str(len(found.by_step))])
    table = _table(["run", "", "largest", "at step", "steps in common"], rows)
    return table + _by_run(runs, lambda run: run.options | run.environment, only_different=True)


def _by_run(runs: Sequence[Run], get: Callable[[Run], dict[str, Any]], *, only_different: bool = False) -> str:
    """A row for each name that a run has, or for each whose value is not the same in all runs."""
    found = [get(run) for run in runs]
    names = dict.fromkeys(name for values in found for name in values)
    rows = [[name, *(_value(values.get(name)) for values in found)] for name in names]
    if only_different:
        rows = [row for row in rows if len(set(row[1:])) > 1]
    return _table(["", *(run.name for run in runs)], rows)


def _value(value: object) -> str:
    if value is None:
        return "-"
    return to_text(value) if isinstance(value, float) else str(value)


def _section(title: str, content: str) -> list[str]:
    return [f"<h2>{title}</h2>", content] if content else []


def _folded(title: str, content: str) -> list[str]:
    return [f"<details><summary>{title}</summary>{content}</details>"] if content else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = "".join(f"<th>{_clean(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{_clean(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{cells}</tr>\n{body}</table>"


def _key(runs: Sequence[Run]) -> str:
    """Which colour is which run, and what else the charts have."""
    lines = [
        f'<span class="key" style="background: {color}"></span>{_clean(run.name)} {_clean(run.about)}<br/>'
        for run, color in zip(runs, _colors(runs), strict=True)
    ]
    notes = ["Each chart is over the steps of training."]
    if any(True for run in runs for _ in _marks(run, "")):
        notes.append("Dotted: stops and starts, see below.")
    if any(run.lost for run in runs):
        notes.append("Pale: trained again after a kill.")
    return f'<p>{"".join(lines)}<span class="note">{" ".join(notes)}</span></p>'


def _colors(runs: Sequence[Run]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(runs))]


def _clean(text: object) -> str:
    """Escaped, without the characters that no page may hold."""
    return escape("".join(c if c >= " " or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(text)))


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def main(parser: ArgumentParser, words: Sequence[str]) -> int:
    """Write the page."""
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="output folder of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first folder")
    args = parser.parse_args(words)
    output = args.output or args.folders[0] / "report.html"
    write(find_runs(args.folders), output)
    print(output)
    return 0
