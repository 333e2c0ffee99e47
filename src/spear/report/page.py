"""Self-contained HTML pages: pictures and films inside as data URIs, no script, light or dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

from PIL import Image

from spear.evaluate.stats import Estimate
from spear.types import Array

CSS = resources.files("spear.report").joinpath("page.css").read_text()


@dataclass(frozen=True)
class Section:
    """One part of a page. body is HTML; seconds is how long the part took to make, shown when given."""

    title: str
    body: str
    seconds: float | None = None


def page(title: str, lead: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """A whole document. lead: HTML under the title; facts: (big text, small text) shown as cards on top."""
    cards = "".join(f'<div class="fact"><b>{escape(b)}</b><span>{escape(s)}</span></div>' for b, s in facts)
    parts = []
    for part in sections:
        took = "" if part.seconds is None else f'<span class="took">{part.seconds:.0f} s</span>'
        parts.append(f"<section>{took}<h2>{escape(part.title)}</h2>{part.body}</section>")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style><main><header><h1>{escape(title)}</h1>{lead}"
        f'<div class="facts">{cards}</div></header>{"".join(parts)}</main></html>\n'
    )


def paragraph(text: str, soft: bool = False) -> str:
    """A paragraph of plain text."""
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def picture(image: Array | bytes, caption: str) -> str:
    """A figure from uint8 pixels [h, w, 3] (stored as PNG) or from PNG bytes; the caption is plain text."""
    if isinstance(image, bytes):
        data = image
    else:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
    source = data_uri(data, "image/png")
    words = escape(caption)
    return f'<figure><img src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'


def film(data: bytes, mime: str, caption: str) -> str:
    """A looping, silent film that starts by itself."""
    source = data_uri(data, mime)
    return (
        f'<figure><video autoplay loop muted playsinline controls src="{source}"></video>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def grid(items: Sequence[str], wide: bool = False) -> str:
    """Figures side by side, as many as the screen is wide enough for."""
    return f'<div class="grid{" wide" if wide else ""}">{"".join(items)}</div>'


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text, which scrolls sideways on a narrow screen."""
    head = "".join(f"<th>{escape(h)}</th>" for h in headers)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def success_bars(groups: Sequence[tuple[str, Sequence[tuple[str, Estimate]]]]) -> str:
    """Success rates as bars with their 95 % intervals: per group (a task family), one bar per policy.

    The first policy of a group is the one that is judged, and stands out; the others are its references.
    """
    rows = []
    for head, bars in groups:
        rows.append(f'<div class="head">{escape(head)}</div>')
        for index, (name, e) in enumerate(bars):
            quiet = " quiet" if index else ""
            span = f"left:{100 * e.low:.1f}%;width:{100 * (e.high - e.low):.1f}%"
            rows.append(
                f'<div class="name">{escape(name)}</div>'
                f'<div class="track"><div class="fill{quiet}" style="width:{100 * e.value:.1f}%"></div>'
                f'<div class="whisker" style="{span}"></div>'
                f"</div><div>{e.value:.0%} [{e.low:.0%}, {e.high:.0%}]</div>"
            )
    return f'<div class="bars">{"".join(rows)}</div>'


def difference_bars(rows: Sequence[tuple[str, Estimate]]) -> str:
    """Differences of rates as dots with their 95 % intervals, on a common axis whose middle is zero."""
    reach = max(0.1, max(max(abs(e.low), abs(e.high)) for _, e in rows))

    def at(value: float) -> float:
        return 50 + 50 * value / reach

    parts = []
    for name, e in rows:
        sure = "" if e.low <= 0 <= e.high else " sure"
        span = f"left:{at(e.low):.1f}%;width:{at(e.high) - at(e.low):.1f}%"
        parts.append(
            f'<div class="name">{escape(name)}</div>'
            f'<div class="track"><div class="zero"></div><div class="whisker" style="{span}"></div>'
            f'<div class="dot{sure}" style="left:{at(e.value):.1f}%"></div></div>'
            f"<div>{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]</div>"
        )
    return f'<div class="bars">{"".join(parts)}</div>'


def data_uri(data: bytes, mime: str) -> str:
    """What a page holds inside instead of a link to a file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
