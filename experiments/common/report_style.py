"""The style sheet of the report's page: plain, in light and dark, and no wider than its window."""

STYLE = """
:root {
  color-scheme: light dark;
  --back: #fdfdfc; --text: #1d2228; --quiet: #59636e; --line: #dfe2e6; --box: #f4f5f6;
  --link: #0757a8; --yes: #1a6b3a; --no: #a4262c; --open: #7a5300; --none: #59636e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15181c; --text: #dde1e6; --quiet: #98a2ad; --line: #30363d; --box: #1d2126;
    --link: #78b4f5; --yes: #6ccb8e; --no: #f28b86; --open: #e3b45c; --none: #98a2ad;
  }
  figure img { filter: invert(0.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 56rem;
  background: var(--back); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: break-word;
}
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0.5rem 0 1rem; }
h2 {
  font-size: 1.3rem; line-height: 1.3; margin: 3.5rem 0 0.5rem; padding-bottom: 0.3rem;
  border-bottom: 1px solid var(--line);
}
h3 { font-size: 1.05rem; line-height: 1.4; margin: 2.25rem 0 0.4rem; }
h3 .id { color: var(--quiet); font-weight: 400; margin-right: 0.4em; }
p { margin: 0.4rem 0; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
.quiet { color: var(--quiet); font-size: 0.875rem; }
.finding {
  margin: 0.9rem 0 0; padding: 0.1rem 0 0.1rem 0.9rem; border-left: 3px solid var(--line);
}
.head { display: flex; flex-wrap: wrap; gap: 0.15rem 0.5rem; align-items: baseline; }
td .head + .head { margin-top: 0.25rem; }
.label {
  display: inline-block; padding: 0 0.5em; border: 1px solid currentColor; border-radius: 0.25rem;
  font-size: 0.8125rem; line-height: 1.5; font-weight: 600; white-space: nowrap;
}
.yes { color: var(--yes); } .no { color: var(--no); }
.open { color: var(--open); } .none { color: var(--none); font-weight: 400; }
dl { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: 0.15rem 0.75rem; }
dl { margin: 0.4rem 0; }
dt { color: var(--quiet); } dd { margin: 0; }
pre {
  margin: 0.5rem 0; padding: 0.5rem 0.7rem; border-radius: 0.25rem; background: var(--box);
  font: 0.8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  overflow-x: auto;
}
pre code {
  display: block; font: inherit; white-space: pre-wrap; padding-left: 2ch; text-indent: -2ch;
}
/* A word of a command is broken only where it is longer than a line. */
pre span { display: inline-block; max-width: 100%; text-indent: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.9375rem; min-width: 100%; }
th, td { padding: 0.35rem 0.9rem 0.35rem 0; text-align: left; vertical-align: top; }
th { color: var(--quiet); font-weight: 400; font-size: 0.875rem; }
tr + tr td, thead + tbody td { border-top: 1px solid var(--line); }
.overview td { line-height: 1.45; }
.overview tbody th { padding-top: 1.1rem; color: var(--text); font-weight: 600; }
.overview td.id { white-space: nowrap; }
td.figure { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.figure:last-child { padding-right: 0; }
.meanings { min-width: 0; }
.meanings tr + tr td { border-top: 0; }
.meanings td { padding-top: 0.1rem; padding-bottom: 0.1rem; }
figure { margin: 0.8rem 0; }
figure img { display: block; max-width: 100%; height: auto; }
@media (max-width: 40rem) {
  /* A row a card: its number, and beside it what is claimed over what was found. */
  .overview, .overview tbody { display: block; }
  .overview tr { display: grid; grid-template-columns: 4.2rem minmax(0, 1fr); }
  .overview tr.section { display: block; }
  .overview tr + tr:not(.section) { border-top: 1px solid var(--line); padding: 0.2rem 0; }
  .overview tr + tr td { border-top: 0; }
  .overview td { padding: 0.15rem 0.5rem 0.15rem 0; }
  .overview td:last-child { grid-column: 2; }
  /* A plot's words are too small at the width of a phone: it scrolls in its own box. */
  figure { overflow-x: auto; }
  figure img { max-width: none; width: 36rem; }
}
@media (max-width: 30rem) {
  .meanings tr { display: grid; grid-template-columns: 2.5rem minmax(0, 1fr); padding: 0.2rem 0; }
  .meanings td:last-child { grid-column: 2; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dt { margin-top: 0.3rem; font-size: 0.875rem; }
}
"""
