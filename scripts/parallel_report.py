"""The report of benchmark_parallel.py: each part's table in Markdown, and what tests recorded for it."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""One line of a part's table; with "failed" or "note", a line below it."""

ABOUT = {
    "parity": "Largest relative difference from one device over five steps, and what is allowed.",
    "train": "A whole step: tokens/s and MFU of one device, peak memory of the first.",
    "head": "Hidden states to both gradients; the floor is the bare matrix products of a rank's share.",
    "profile": "The collectives of one step on rank 0, with tensor parallel 2 and the fused loss. Hidden is the share"
    " of their time in which arithmetic ran too.",
    "restart": "A worker is killed, or half of the ranks go on with a run; the differences are those of every step, in"
    " each life, from a run left alone.",
}
# A key of the rows, and how its value is written.
COLUMNS = {
    "parity": "name loss_difference:.1e loss_bound:.1e grad_norm_difference:.1e grad_norm_bound:.1e",
    "train": "name ranks batch tokens_per_second:,.0f mfu:.1% reserved_gib:.1f allocated_gib:.1f",
    "head": "tp tokens name ms:.2f floor_ms:.2f x_floor:.2f peak_mib:.0f moved_mb:.1f loss:.6f d_hidden_error:.1e"
    " d_weight_error:.1e",
    "profile": "collective dtype ranks count ms:.2f hidden:.0% mb:.2f largest_mb:.2f",
    "restart": "name killed_after_step:.0f continued_at_step:.0f seconds_to_restart:.1f loss_difference:.1e"
    " grad_norm_difference:.1e",
}


def format_part(part: str, rows: Sequence[Row]) -> str:
    """The part's section."""
    columns = [(key, form) for key, _, form in (column.partition(":") for column in COLUMNS[part].split())]
    lines = [f"## {part}", "", ABOUT[part], ""]
    measured = [row for row in rows if any(key in row for key, _ in columns if key != "name")]
    if measured:
        lines += [f"| {' | '.join(key.replace('_', ' ') for key, _ in columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_format(row.get(key), form) for key, form in columns)} |" for row in measured]
        lines.append("")
    lines += [f"**Failed**: {row['name']}: {row['failed']}\n" for row in rows if "failed" in row]
    lines += [f"{row['note']}\n" for row in rows if "note" in row]
    return "\n".join(lines)


def _format(value: Any, form: str) -> str:
    is_known = value is not None and value == value  # not NaN
    return format(value, form) if is_known else "n/a"


def read_tests(path: Path) -> Iterator[Row]:
    """Of each test in a file of JUnit's format: its id, the numbers that it recorded, and how it failed."""
    for case in ElementTree.parse(path).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        row: Row = {"name": case.attrib["name"].partition("[")[2].removesuffix("]") or case.attrib["name"]}
        row |= {p.attrib["name"]: float(p.attrib["value"]) for p in case.iter("property")}
        for problem in [*case.iter("failure"), *case.iter("error")]:
            row["failed"] = problem.get("message", "").partition("\n")[0]
        yield row
