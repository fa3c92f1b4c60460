"""The page: HTML that needs nothing else, in light and dark, on a small screen and on paper; or Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

import cimjax
from cimjax.analysis.plot import check_writable
from cimjax.analysis.report.drawing import swatch
from cimjax.analysis.report.gather import Facts, Group, gather, grouped
from cimjax.analysis.report.sections import Section, Table, sections_of
from cimjax.spec.base import shown
from cimjax.training.run.files import write_atomically

# What stands in a cell of numbers: they are aligned at their ends.
_A_NUMBER = re.compile(r"-|\(?-?\d[\d.,]*( ± [\d.]+)?( ?%|\)| [kMGT]| of \d+)?|\d+(\xd7\d+)*|\d+/\d+")
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5f6670; --line: #dfe2e6; --back: #fff;
  --g0: #1f5f99; --g1: #c2500a; --g2: #2f7d5b; --g3: #8a4f87; --g4: #6b6f76; --g5: #8a6d1a }
@media screen and (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --soft: #9aa2ad; --line: #33383f;
  --back: #16181b; --g0: #74b0e6; --g1: #f0935a; --g2: #6cc3a0; --g3: #cf97cb; --g4: #b3b8c0;
  --g5: #d6b85a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1100px; padding: 28px 20px 60px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere }
h1 { font-size: 25px; line-height: 1.25; font-weight: 600; margin: 0 0 6px }
h2 { font-size: 18px; font-weight: 600; margin: 40px 0 6px; padding-top: 12px; border-top: 1px solid var(--line) }
h3, h4 { font-size: 15px; font-weight: 600; margin: 20px 0 4px }
p { margin: 4px 0 10px; color: var(--soft); max-width: 75ch }
ul { list-style: none; margin: 0; padding: 0 } li { margin: 2px 0 }
.soft { color: var(--soft) }
.scroll { overflow-x: auto; margin: 8px 0 14px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th { font-weight: 500; color: var(--soft); text-align: left; vertical-align: bottom; overflow-wrap: normal }
th, td { padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: top }
thead th { white-space: normal; line-height: 1.3; vertical-align: bottom }
thead th.number { min-width: 4.8em }
td:last-child, th:last-child { padding-right: 0 } td.long { white-space: normal; min-width: 16em }
tbody th { color: var(--text); font-weight: 400; position: sticky; left: 0; background: var(--back) }
th.number, td.number { text-align: right } tfoot td, tfoot th { border-bottom: 0; font-weight: 600; color: var(--text) }
details { margin: 8px 0 } summary { cursor: pointer; padding: 4px 0 } summary h2, summary h3 { display: inline;
  border: 0; padding: 0; margin: 0 }
details.section { margin-top: 32px; padding-top: 10px; border-top: 1px solid var(--line) }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--g0); outline-offset: 2px }
.figures { display: grid; gap: 14px 28px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)) }
.figures.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 240px), 1fr)); gap: 10px 24px }
.figures > svg { display: block; width: 100%; height: auto; max-width: 560px } .figures.small > svg { max-width: 300px }
text { font-size: 12px; fill: var(--soft) } text.title { fill: var(--text) } .small text { font-size: 11px }
path { fill: none; stroke: var(--soft) } .grid { stroke: var(--line) } .axis, .zero { stroke: var(--soft) }
.switch { stroke-dasharray: 1 3; stroke-width: 1.5 } .curve { stroke: currentColor; stroke-width: 1.7 }
circle { fill: currentColor } .bar { fill: var(--g0); stroke: none } .side { stroke: var(--g0); stroke-width: .6 }
.rung { stroke: var(--g0); stroke-width: 1.4 }
.swatch { display: inline-block; width: 24px; height: 8px; margin-right: 8px; vertical-align: middle }
.g0 { color: var(--g0) } .g1 { color: var(--g1) } .g2 { color: var(--g2) }
.g3 { color: var(--g3) } .g4 { color: var(--g4) } .g5 { color: var(--g5) }
@media screen and (max-width: 560px) { text { font-size: 13px } }
@media print { body { max-width: none; padding: 0; font-size: 11px } table { font-size: 10px }
  svg, tr { break-inside: avoid } h2, h3, h4, summary { break-after: avoid }
  .scroll { overflow: visible } th, td { padding-right: 8px; white-space: normal }
  details::details-content { content-visibility: visible; block-size: auto } }
"""


def report(runs: Sequence[str | Path], path: str | Path, *, say: Callable[[str], None] = lambda text: None) -> None:
    """Write one page about runs: results, curves, layers, ADCs, their ladders and weight codes, options.

    The same runs give the same file.

    Args:
      runs: run folders; also of runs that still go on.
      path: the file, which is replaced: .html, or .md for the tables alone.
      say: is told what is being done.

    Raises:
      ValueError: in one line: for another kind of file or one that cannot be written, where a folder holds no run or
        no finished epoch.
    """
    path = Path(path)
    check_page(path)
    facts = gather(runs, say)
    write = _markdown if path.suffix.lower() == ".md" else _html
    write_atomically(path, write(facts, grouped(facts)).encode("utf-8", "replace"))


def check_page(path: Path) -> None:
    """Refuse a page that could not be written.

    Raises:
      ValueError: in one line.
    """
    if path.suffix.lower() not in (".html", ".htm", ".md"):
        raise ValueError(
            f"a report is HTML or Markdown, not {shown(str(path))}; give a name that ends in .html or .md."
        )
    check_writable(path)


def _title(facts: Sequence[Facts]) -> str:
    return facts[0].run.label if len(facts) == 1 else f"{len(facts)} runs"


def _abouts(facts: Sequence[Facts], groups: Sequence[Group]) -> Iterator[tuple[str, str]]:
    """Every group's name and what it is; the name of a single one is the title."""
    for group in groups:
        name = f"{group.name}{f' ({len(group.members)} runs)' if len(group.members) > 1 else ''}"
        yield ("" if len(facts) == 1 else name, facts[group.members[0]].about)


def _html(facts: Sequence[Facts], groups: Sequence[Group]) -> str:
    title = _text(_title(facts))
    abouts = [
        f'<li>{f"{swatch(number)}{_text(name)} " if name else ""}<span class="soft">{_text(about)}</span></li>'
        for number, (name, about) in enumerate(_abouts(facts, groups))
    ]
    body = "".join(_section(section) for section in sections_of(facts, groups))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="generator" content="cimjax {cimjax.__version__}">
<title>{title} - cimjax report</title>
<style>{_STYLE}</style>
</head>
<body>
<header><h1>{title}</h1><ul>{"".join(abouts)}</ul></header>
<main>
{body}</main>
</body>
</html>
"""


def _section(section: Section, level: int = 2) -> str:
    """A section; one that is folded, or is a part with tables of its own, can be opened and closed."""
    parts = [f"<p>{_text(note)}</p>" for note in section.notes]
    parts += [_table(table) for table in section.tables]
    if section.figures:
        small = " small" if level > 2 else ""
        parts.append(f'<div class="figures{small}">{"".join(figure.svg for figure in section.figures)}</div>')
    parts += [_section(part, level + 1) for part in section.parts]
    heading, content = f"<h{level}>{_text(section.title)}</h{level}>", "\n".join(parts)
    if section.folded or (level > 2 and section.tables):
        kind, opened = (' class="section"' if level == 2 else ""), "" if section.folded else " open"
        return f"<details{kind}{opened}><summary>{heading}</summary>\n{content}\n</details>\n"
    return f"<section>{heading}\n{content}\n</section>\n"


def _table(table: Table) -> str:
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.head)
    classes = [' class="number"' if all(map(_A_NUMBER.fullmatch, column)) else "" for column in columns]
    # Dotted names may be broken.
    names = [_text(name).replace(".", ".<wbr>").replace("_", "_<wbr>") for name in table.head]
    head = "".join(f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, classes, strict=True))
    marks = [swatch(group) for group in table.groups] or [""] * len(table.rows)
    rows = "".join(_row(row, classes, mark) for row, mark in zip(table.rows, marks, strict=True))
    foot = f"<tfoot>{_row(table.total, classes)}</tfoot>" if table.total else ""
    inside = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>{foot}"
    return f'<div class="scroll" tabindex="0"><table>{inside}</table></div>'


def _row(row: Sequence[str], classes: Sequence[str], mark: str = "") -> str:
    first, *rest = row
    kinds = [' class="long"' if len(text) > 60 else kind for text, kind in zip(rest, classes[1:], strict=True)]
    cells = [f"<td{kind}>{_text(text)}</td>" for text, kind in zip(rest, kinds, strict=True)]
    return f'<tr><th scope="row">{mark}{_text(first)}</th>{"".join(cells)}</tr>'


def _text(text: str) -> str:
    return escape(_visible(text))


def _visible(text: str) -> str:
    """One line of letters that can be seen: names of folders may hold anything."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def _markdown(facts: Sequence[Facts], groups: Sequence[Group]) -> str:
    lines = [f"# {_marked(_title(facts))}", ""]
    lines += [f"- {_marked(f'{name}: {about}' if name else about)}" for name, about in _abouts(facts, groups)]
    for section in sections_of(facts, groups):
        lines += _markdown_section(section)
    return "\n".join([*lines, ""])


def _markdown_section(section: Section, level: int = 2) -> Iterator[str]:
    tables = [*section.tables, *(figure.table for figure in section.figures if figure.table)]
    if not (tables or section.parts or section.notes):
        return
    yield from ("", f"{'#' * level} {_marked(section.title)}")
    for note in section.notes:
        yield from ("", _marked(note))
    for table in tables:
        yield ""
        yield from (_markdown_row(table.head), "|" + " --- |" * len(table.head))
        yield from map(_markdown_row, [*table.rows, *([table.total] if table.total else [])])
    for part in section.parts:
        yield from _markdown_section(part, level + 1)


def _markdown_row(row: Sequence[str]) -> str:
    return f"| {' | '.join(map(_marked, row))} |"


def _marked(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", _visible(text))
