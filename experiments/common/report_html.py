"""The report as one HTML file that needs no other: style within, pictures as data."""

from __future__ import annotations

import base64
import pathlib
import re
from collections.abc import Mapping, Sequence
from html import escape

from experiments.common import report_again
from experiments.common import report_words as words
from experiments.common.claims import Claim
from experiments.common.report_command import command_of
from experiments.common.report_findings import Finding, Judged
from experiments.common.report_read import Result
from experiments.common.report_style import STYLE

SHADES: dict[str, str] = dict(zip(words.VERDICTS, ("yes", "no", "open", "none"), strict=True))
TYPES = {".svg": "image/svg+xml", ".png": "image/png"}


def page(
    judged: Sequence[Judged], rest: Sequence[Result], again: Mapping[str, Result], root: str
) -> str:
    """The whole file. **Arguments:** `rest`, results of no claim; `again`, those made again."""
    first = words.first_claims(judged)
    parts = [f"<h1>{words.TITLE}</h1>", f"<p>{escape(words.INTRODUCTION)}</p>", meanings(judged)]
    notes = (*words.NOTES, report_again.summary(judged))
    parts += [f'<p class="quiet">{escape(note)}</p>' for note in notes if note]
    parts.append(overview(judged))
    for name, of in words.sections(judged).items():
        parts.append(f"<h2>{escape(name)}</h2>")
        parts += [claim(j, first, root) for j in of]
    if rest:
        parts.append(f'<h2 id="rest">{words.REST}</h2>')
        parts.append("<p>Runs that no claim above is judged from.</p>")
        parts += [other(r, again.get(r.name), root) for r in rest]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>jpeft: {words.TITLE.lower()}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(parts)}\n</main>\n</body>\n</html>\n"
    )


def label(verdict: str) -> str:
    """A verdict, coloured."""
    return f'<span class="label {SHADES[verdict]}">{escape(verdict)}</span>'


def meanings(judged: Sequence[Judged]) -> str:
    """What each verdict means, and how often it is there."""
    rows = "\n".join(
        f'<tr><td class="figure">{n}</td><td>{label(v)}</td>'
        f"<td>{escape(words.MEANINGS[v])}</td></tr>"
        for v, n in words.tally(judged)
    )
    return f'<div class="scroll"><table class="meanings"><tbody>\n{rows}\n</tbody></table></div>'


def overview(judged: Sequence[Judged]) -> str:
    """A line a claim."""
    rows: list[str] = []
    for name, of in words.sections(judged).items():
        rows.append(f'<tr class="section"><th colspan="3">{escape(name)}</th></tr>')
        for j in of:
            verdicts = "".join(
                f'<div class="head">{label(words.word(f))}'
                f'<span class="quiet">{escape(f.label)}</span></div>'
                for f in j.findings
            )
            rows.append(
                f'<tr><td class="id"><a href="#{anchor(j.claim)}">{words.number_of(j)}</a></td>'
                f"<td>{escape(j.claim.sentence)}</td><td>{verdicts}</td></tr>"
            )
    return (
        '<div class="scroll"><table class="overview">\n<tbody>\n'
        f"{chr(10).join(rows)}\n</tbody></table></div>"
    )


def anchor(claim: Claim) -> str:
    """Where a claim is on the page."""
    return f"claim-{claim.id}"


def claim(j: Judged, first: dict[str, str], root: str) -> str:
    """A claim, the paper's figure, and each finding."""
    c = j.claim
    found = "\n".join(finding(f, c, first, root) for f in j.findings)
    return (
        f'<article id="{anchor(c)}">\n<h3><span class="id">{words.number_of(j)}</span>'
        f"{escape(c.sentence)}</h3>\n"
        f'<p><span class="quiet">{escape(c.source)}:</span> {escape(c.figure)}</p>\n'
        f"{found}\n</article>"
    )


def finding(f: Finding, c: Claim, first: dict[str, str], root: str) -> str:
    """A verdict, why, and where it is from."""
    name = f'<span class="quiet">{escape(f.label)}</span>' if f.label else ""
    parts = [f'<div class="head">{label(words.word(f))}{name}</div>']
    if f.verdict is None:
        parts.append(command(f.command))
    else:
        v = f.verdict
        lines = (
            ("ours", v.ours),
            ("interval", v.interval),
            ("why", v.reason),
            ("again", report_again.told(f)),
        )
        each = "".join(f"<dt>{k}</dt><dd>{escape(x)}</dd>" for k, x in lines if x)
        parts.append(f"<dl>{each}</dl>")
        if not f.results:
            parts.append(command(c.command))
    for r in f.results:
        parts.append(source(r, root))
        if first[r.name] == c.id:
            parts += pictures(r)
    return f'<div class="finding">\n{chr(10).join(parts)}\n</div>'


def command(line: str) -> str:
    """Lines for the shell."""

    def words_of(x: str) -> str:
        return " ".join(f"<span>{escape(w)}</span>" for w in x.split(" "))

    lines = (f"<code>{words_of(x)}</code>" for x in line.split("\n"))
    return f"<pre>{chr(10).join(lines)}</pre>"


def source(r: Result, root: str) -> str:
    """How a result was made: command, machine, date and versions."""
    return (
        f"{command(command_of(r, root))}\n"
        f'<p class="quiet">{escape(words.where(r))}, {escape(words.date(r))}<br>'
        f"{escape(words.versions(r))}</p>"
    )


def pictures(r: Result) -> list[str]:
    """A result's plots."""
    return [
        f'<figure><img alt="{escape(words.alt(r, p.stem))}" src="{data_of(p)}"></figure>'
        for p in r.pictures
    ]


def data_of(path: pathlib.Path) -> str:
    """A picture as a data URI; of an SVG without what its maker says of itself."""
    content = path.read_bytes()
    if path.suffix == ".svg":
        text = content.decode("utf-8")
        for pattern in (r"<metadata>.*?</metadata>", r"<!DOCTYPE.*?>", r"<\?xml.*?\?>"):
            text = re.sub(pattern, "", text, flags=re.DOTALL)
        content = text.strip().encode("utf-8")
    return f"data:{TYPES[path.suffix]};base64,{base64.b64encode(content).decode('ascii')}"


def other(r: Result, again: Result | None, root: str) -> str:
    """A result that no claim is judged from, with its figures of another day beside it."""
    head, *lines = words.columns(r, again)
    rows = [_row(line) for line in lines]
    if again is not None:
        rows.insert(0, _row(head))
    body = "\n".join(rows)
    table = f'<div class="scroll"><table><tbody>\n{body}\n</tbody></table></div>' if lines else ""
    return "\n".join([f"<h3>{escape(r.name)}</h3>", table, source(r, root), *pictures(r)])


def _row(cells: Sequence[str]) -> str:
    first, *rest = map(escape, cells)
    figures = "".join(f'<td class="figure">{x}</td>' for x in rest)
    return f"<tr><td>{first}</td>{figures}</tr>"
