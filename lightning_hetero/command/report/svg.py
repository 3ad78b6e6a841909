"""Draw with matplotlib into SVG for the page: colours follow the style of the page, and ids do not collide."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist

__all__ = ["CARD", "GRID", "INK", "MUTED", "SERIES", "Tips", "clean", "draw", "number"]

# placeholders: each becomes a variable of the page's style, which has a light and a dark value
INK, GRID, MUTED, CARD = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#0101{16 + i:02x}" for i in range(8))
_VARIABLES = {INK: "ink", GRID: "grid", MUTED: "muted", CARD: "card"}
_VARIABLES |= {colour: f"c{i}" for i, colour in enumerate(SERIES)}

_MAX_CHARACTERS = 200
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_hetero",
    "text.parse_math": False,  # a $ in the name of a device is just a $
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "grid.color": GRID,
    "axes.edgecolor": MUTED,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}


def clean(text: str, most: int = _MAX_CHARACTERS) -> str:
    """Return a text of a record, shortened, and with unprintable characters replaced."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[: most + 1])
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def number(value: float) -> str:
    """Return a number of samples per second in readable form."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


class Tips:
    """Tooltips, which a browser shows while the pointer rests on a part of a chart."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, artist: Artist, text: str) -> None:
        """Give a part of the chart a tooltip."""
        artist.set_gid(f"tip-{len(self.texts)}")
        self.texts.append(text)


def draw(name: str, label: str, size: tuple[float, float], paint: Callable[[Figure, Tips], None]) -> Markup:
    """Return a chart as one SVG element, identical for identical input.

    Args:
        name: Name of the chart, a word that is unique in the page.
        label: Description of the chart, for readers who cannot see it.
        size: Width and height in inches; the page scales the chart to its own width.
        paint: Function that draws into the figure.
    """
    tips, out = Tips(), io.StringIO()
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about glyphs that matplotlib's font lacks; the browser uses its own fonts
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        paint(figure, tips)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=metadata)
    return Markup(_for_page(out.getvalue(), name, label, tips.texts))  # matplotlib has escaped the texts


def _for_page(svg: str, name: str, label: str, tips: Sequence[str]) -> str:
    svg = svg[svg.index("<svg") :]
    (view_box,) = re.findall(r'viewBox="([\d. -]+)"', svg[: svg.index(">")])
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r'<g id="tip-(\d+)">', lambda m: f"<g><title>{html.escape(tips[int(m[1])])}</title>", body)
    # drop ids that nothing refers to, and make the others unique in the page
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', body))
    body = re.sub(r' id="([^"<>]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r'style="[^"<>]*"', lambda m: _style_of_page(m[0]), body)
    return (
        f'<svg viewBox="{view_box}" role="img" aria-label="{html.escape(label)}" xmlns="http://www.w3.org/2000/svg"'
        f' xmlns:xlink="http://www.w3.org/1999/xlink">{body.rstrip()}'
    )


def _style_of_page(style: str) -> str:
    style = re.sub(r"font: ([^;\"]*?)([\d.]+px) '[^;\"]*", r"font: \1\2 var(--font)", style)
    return re.sub(
        r"(fill|stroke): (#0101[0-9a-f]{2})\b",
        lambda m: f"{m[1]}: var(--{_VARIABLES[m[2]]})" if m[2] in _VARIABLES else m[0],
        style,
    )
