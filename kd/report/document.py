"""The blocks of a report, each written as Markdown, as HTML or on the terminal."""

import base64
import html
import itertools
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

DARK = "(prefers-color-scheme: dark)"
STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #57606a; --paper: #ffffff; --line: #d0d7de; --band: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --line: #3d444d; --band: #161b22; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { margin: 2rem 0 .5rem; } p, li { max-width: 46rem; } ul { padding-left: 1.3rem; }
.lead { font-size: 1.1rem; }
.table { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px;
  background: linear-gradient(to left, var(--paper) 50%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--line), transparent) right / .7rem 100% no-repeat; } /* a shadow: more to the right */
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--band); } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, .words { text-align: left; }
td.words { white-space: normal; overflow-wrap: break-word; }
td.words:first-child { min-width: 9rem; } td.words:nth-child(2) { min-width: 6rem; }
td.words:last-child { min-width: 12rem; }
.note { color: var(--soft); font-size: .85rem; margin: .4rem 0 1.5rem; }
figure { margin: 1.5rem 0 2rem; max-width: 40rem; }
figure img { width: 100%; max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .85rem; margin-top: .4rem; } figcaption strong { color: var(--ink); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1rem; max-width: 60rem; }
dt { color: var(--soft); } dd { margin: 0; }
@media (max-width: 40rem) { dl { display: block; } dd { margin-bottom: .6rem; } }
"""


class Block(ABC):
    @abstractmethod
    def markdown(self) -> str: ...

    @abstractmethod
    def html(self) -> str: ...

    def show(self, console: Console) -> None:  # noqa: B027  a figure has nothing to print
        """Print it on the terminal."""


@dataclass(frozen=True)
class Heading(Block):
    level: int
    text: str
    quiet: bool = False

    def markdown(self) -> str:
        return f"{'#' * self.level} {plain(self.text)}"

    def html(self) -> str:
        return f"<h{self.level}>{html.escape(self.text)}</h{self.level}>"

    def show(self, console: Console) -> None:
        if not self.quiet:
            console.print(Text(f"\n{self.text}", style="bold"))


@dataclass(frozen=True)
class Paragraph(Block):
    text: str
    lead: bool = False  # in larger type

    def markdown(self) -> str:
        return f"**{plain(self.text)}**" if self.lead else plain(self.text)

    def html(self) -> str:
        mark = ' class="lead"' if self.lead else ""
        return f"<p{mark}>{html.escape(self.text)}</p>"

    def show(self, console: Console) -> None:
        console.print(Text(self.text, style="bold" if self.lead else ""))


@dataclass(frozen=True)
class Facts(Block):
    """Names with a value each."""

    facts: dict[str, str]

    def markdown(self) -> str:
        return "\n".join(f"- **{plain(name)}:** {plain(value)}" for name, value in self.facts.items())

    def html(self) -> str:
        pairs = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in self.facts.items())
        return f"<dl>{''.join(pairs)}</dl>"


@dataclass(frozen=True)
class Lines(Block):
    """A list of sentences."""

    lines: tuple[str, ...]

    def markdown(self) -> str:
        return "\n".join(f"- {plain(line)}" for line in self.lines)

    def html(self) -> str:
        return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in self.lines)}</ul>"

    def show(self, console: Console) -> None:
        for line in self.lines:
            console.print(Text(f"- {line}"))


@dataclass(frozen=True)
class Table(Block):
    """A table of cells that are text already. The first `words` columns, and with `remark` the last, hold prose."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""
    words: int = 1
    remark: bool = False
    quiet: bool = False  # too long to print on the terminal

    def _is_text(self, column: int) -> bool:
        return column < self.words or (self.remark and column == len(self.head) - 1)

    def markdown(self) -> str:
        rule = [":--" if self._is_text(column) else "--:" for column in range(len(self.head))]
        lines = [self.head, rule, *([plain(cell) for cell in row] for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{plain(self.note)}" if self.note else table

    def html(self) -> str:
        marks = [' class="words"' if self._is_text(column) else "" for column in range(len(self.head))]

        def row(cells, tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(cells, marks)) + "</tr>"

        body = "\n".join(row(cells, "td") for cells in self.rows)
        table = (
            f'<div class="table"><table><thead>{row(self.head, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'
        )
        return f'{table}\n<p class="note">{html.escape(self.note)}</p>' if self.note else table

    def show(self, console: Console) -> None:
        if self.quiet:
            return
        grid = Grid(box=box.SIMPLE, pad_edge=False)
        for column, title in enumerate(self.head):
            grid.add_column(title, justify="left" if self._is_text(column) else "right")
        for cells in self.rows:
            grid.add_row(*(Text(cell) for cell in cells))
        console.print(grid)
        if self.note:
            console.print(Text(self.note, style="dim"))


@dataclass(frozen=True)
class Figure(Block):
    """A picture in a light and a dark theme: the page embeds both, and the light one is a file beside the report."""

    file: str
    title: str
    caption: str
    png: bytes
    dark: bytes
    number: int = 0  # see `numbered`

    @property
    def heading(self) -> str:
        return f"Figure {self.number}: {self.title}"

    def markdown(self) -> str:
        heading = plain(self.heading)
        return f"![{heading}]({self.file})\n\n**{heading}** {plain(self.caption)}"

    def html(self) -> str:
        heading, caption = html.escape(self.heading), html.escape(self.caption)
        return (
            f'<figure><picture><source media="{DARK}" srcset="{_embedded(self.dark)}">'
            f'<img src="{_embedded(self.png)}" alt="{heading}"></picture>'
            f"<figcaption><strong>{heading}</strong> {caption}</figcaption></figure>"
        )


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def numbered(blocks: list[Block]) -> list[Block]:
    """The same blocks, with their figures numbered from 1 in the order in which they stand."""
    numbers = itertools.count(1)
    return [replace(block, number=next(numbers)) if isinstance(block, Figure) else block for block in blocks]


def plain(text: str) -> str:
    """Escape `text`, such as a folder's or a class's name, so that Markdown shows it unchanged."""
    text = " ".join(html.escape(text, quote=False).split())
    return re.sub(r"([\\`*_\[\]|#$~])", r"\\\1", text)


def markdown(blocks: list[Block]) -> str:
    return "\n\n".join(block.markdown() for block in blocks) + "\n"


def page(title: str, blocks: list[Block]) -> str:
    """A self-contained HTML page, for narrow and wide windows, light and dark."""
    body = "\n".join(block.html() for block in blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
