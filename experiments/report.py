"""Gather results on one page: what papers claim, what was found here, and by which command.

Writes an HTML file that needs no other, and Markdown that links the pictures. Without arguments:
the results of this repository, into docs/report.html and docs/report.md.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from experiments.common import report_html, report_markdown, report_words
from experiments.common.claims import Claim
from experiments.common.claims_all import every
from experiments.common.command import command
from experiments.common.report_again import by_name, held
from experiments.common.report_findings import Judged, judge, unclaimed
from experiments.common.report_read import ReportError, Result, read_results
from jpeft._disk import atomically

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Config:
    """Which results, and where to."""

    results: pathlib.Path = ROOT / "docs" / "results"
    """The folder whose result.json files are gathered, and those in folders below."""
    out: pathlib.Path = ROOT / "docs" / "report"
    """The pages, without their endings .html and .md."""
    again: pathlib.Path | None = None
    """Results of the same names that the same commands made on another day: each finding says how
    they stand to the first. Without it the folder `again` beside --results, if there is one."""
    check: bool = False
    """Write nothing, and fail where the Markdown page is not as the results are."""


@dataclasses.dataclass(frozen=True)
class Report:
    """The claims with their findings, the results of none, and both pages."""

    judged: tuple[Judged, ...]
    rest: tuple[Result, ...]
    html: str
    markdown: str


def made(
    results: pathlib.Path,
    out: pathlib.Path,
    claims: tuple[Claim, ...],
    again: pathlib.Path | None = None,
) -> Report:
    """The report of a folder of results. **Raises:** `ReportError` that names the file."""
    found = read_results(results)
    if again is None and (results.parent / "again").is_dir():
        again = results.parent / "again"
    later = by_name(found, read_results(again)) if again else {}
    judged = held([judge(c, found) for c in claims], later)
    rest = tuple(unclaimed(found, judged))
    shown = _shown(results)
    return Report(
        judged,
        rest,
        report_html.page(judged, rest, later, shown),
        report_markdown.page(judged, rest, later, shown, out.parent),
    )


def _shown(folder: pathlib.Path) -> str:
    """The folder as commands name it: from the repository, where it is inside."""
    whole = folder.resolve()
    inside = whole.is_relative_to(ROOT)
    return whole.relative_to(ROOT).as_posix() if inside else folder.as_posix()


def main(config: Config, console: Console | None = None) -> dict[str, Any]:
    """Gather, judge, print and write; returns how often there is each verdict."""
    console = console or Console()
    report = made(config.results, config.out, every(), config.again)
    console.print(table(report))
    pages = {
        config.out.with_name(f"{config.out.name}.html"): report.html,
        config.out.with_name(f"{config.out.name}.md"): report.markdown,
    }
    if config.check:
        path = config.out.with_name(f"{config.out.name}.md")
        if not path.is_file() or path.read_text(encoding="utf-8") != report.markdown:
            raise ReportError(f"{path} is not as the results are: python -m experiments.report")
    else:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        atomically({p: _writer(text) for p, text in pages.items()})
        console.print(f"written to {', '.join(str(p) for p in pages)}")
    return dict(report_words.tally(report.judged))


def _writer(text: str) -> Any:
    return lambda path: path.write_text(text, encoding="utf-8")


def table(report: Report) -> Table:
    """A line a finding."""
    out = Table(title=f"{len(report.judged)} claims, and {len(report.rest)} results of none")
    for name in ("claim", "on", "verdict", "interval", "made again"):
        out.add_column(name)
    for j in report.judged:
        for f in j.findings:
            interval = f.verdict.interval if f.verdict else ""
            again = f.again.kind if f.again else ""
            out.add_row(j.claim.id, f.label, report_words.word(f), interval, again)
    return out


if __name__ == "__main__":
    sys.exit(command("report", Config, main, __doc__))
