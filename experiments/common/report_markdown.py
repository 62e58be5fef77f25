"""The report as Markdown for the repository, with its pictures linked."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from experiments.common import report_again
from experiments.common import report_words as words
from experiments.common.claims import Claim
from experiments.common.report_command import command_of
from experiments.common.report_findings import Finding, Judged
from experiments.common.report_read import Result


def page(
    judged: Sequence[Judged],
    rest: Sequence[Result],
    again: Mapping[str, Result],
    root: str,
    folder: pathlib.Path,
) -> str:
    """The whole file.

    **Arguments:** `rest`, results of no claim; `again`, those made again, by name; `folder`, where
    the file is to be: links are relative to it.
    """
    first = words.first_claims(judged)
    parts = [f"# {words.TITLE}", plain(words.INTRODUCTION), meanings(judged)]
    parts += [plain(note) for note in (*words.NOTES, report_again.summary(judged)) if note]
    parts.append(overview(judged))
    for name, of in words.sections(judged).items():
        parts.append(f"## {plain(name)}")
        for j in of:
            parts += claim(j, first, root, folder)
    if rest:
        parts += [f"## {words.REST}", "Runs that no claim above is judged from."]
        for r in rest:
            parts += other(r, again.get(r.name), root, folder)
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text in which nothing is Markdown."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~])", r"\\\1", text)


def meanings(judged: Sequence[Judged]) -> str:
    """What each verdict means, and how often it is there."""
    rows = [f"| **{v}** | {n} | {plain(words.MEANINGS[v])} |" for v, n in words.tally(judged)]
    return "\n".join(["| verdict | | |", "|---|--:|---|", *rows])


def overview(judged: Sequence[Judged]) -> str:
    """A line a claim."""
    rows = ["| | claim | verdict |", "|---|---|---|"]
    for j in judged:
        each = (f"{f.label}: **{words.word(f)}**".removeprefix(": ") for f in j.findings)
        link = f"[{words.number_of(j)}](#{anchor(j.claim)})"
        rows.append(f"| {link} | {plain(j.claim.sentence)} | {'<br>'.join(each)} |")
    return "\n".join(rows)


def anchor(c: Claim) -> str:
    """Where a claim is on the page."""
    return f"claim-{c.id}"


def claim(j: Judged, first: dict[str, str], root: str, folder: pathlib.Path) -> list[str]:
    """A claim, the paper's figure, and each finding."""
    c = j.claim
    parts = [
        f'<a id="{anchor(c)}"></a>',
        f"### {words.number_of(j)}. {plain(c.sentence)}",
        f"{plain(c.source)}: {plain(c.figure)}.",
    ]
    for f in j.findings:
        parts += finding(f, c, first, root, folder)
    return parts


def finding(
    f: Finding, c: Claim, first: dict[str, str], root: str, folder: pathlib.Path
) -> list[str]:
    """A verdict, why, and where it is from."""
    head = f"**{words.word(f)}**" + (f", {plain(f.label)}" if f.label else "")
    if f.verdict is None:
        return [f"{head}:", command(f.command)]
    v = f.verdict
    lines = (
        ("ours", v.ours),
        ("interval", v.interval),
        ("why", v.reason),
        ("made again", report_again.told(f)),
    )
    parts = [head + "\n\n" + "\n".join(f"- {k}: {plain(x)}" for k, x in lines if x)]
    if not f.results:
        parts.append(command(c.command))
    for r in f.results:
        parts += source(r, root)
        if first[r.name] == c.id:
            parts += pictures(r, folder)
    return parts


def command(line: str) -> str:
    """Lines for the shell."""
    return f"```sh\n{line}\n```"


def source(r: Result, root: str) -> list[str]:
    """How a result was made: command, machine, date and versions."""
    told = f"{words.where(r)}, {words.date(r)}; {words.versions(r)}"
    return [command(command_of(r, root)), plain(told)]


def pictures(r: Result, folder: pathlib.Path) -> list[str]:
    """A result's plots, linked."""
    return [f"![{plain(words.alt(r, p.stem))}]({link(p, folder)})" for p in r.pictures]


def link(path: pathlib.Path, folder: pathlib.Path) -> str:
    """A file's address from a folder; the PNG of a plot where there is one."""
    png = path.with_suffix(".png")
    shown = png if png.is_file() else path
    relative = os.path.relpath(shown.resolve(), folder.resolve())
    return quote(pathlib.PurePath(relative).as_posix())


def other(r: Result, again: Result | None, root: str, folder: pathlib.Path) -> list[str]:
    """A result that no claim is judged from, with its figures of another day beside it."""
    columns = words.columns(r, again)
    rows = ["| " + " | ".join(map(plain, line)) + " |" for line in columns]
    rows.insert(1, "|---" + "|--:" * (len(columns[0]) - 1) + "|")
    table = ["\n".join(rows)] if columns[1:] else []
    return [f"### {plain(r.name)}", *table, *source(r, root), *pictures(r, folder)]
