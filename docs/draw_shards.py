"""Draw docs/images/shards.svg: the ragged rows of two devices, and a step in which transfers and computations overlap.

    python docs/draw_shards.py

The package computes where the row of a unit is cut for weights of 2:1, and when units are gathered, used and reduced
in a step of 60 ms with three units, of which a gather takes 6 ms and a reduction 8 ms. Colours are readable on white
and on black.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

from draw_how_it_works import COLOURS, GREY, HEIGHT, LEFT, bar, text

from lightning_hetero.balance.shards.cuts import Cutter
from lightning_hetero.balance.shards.step import ShardedStep

PARAMETERS = {"layer 1: weight": 64 * 64, "bias": 64, "layer 2: weight": 64 * 48, "bias ": 48}
WEIGHTS = (2, 1)
STEP = ShardedStep(own_s=0.060, gather_s=0.006, reduce_s=0.008, units=3)
WIDTH = 560.0
SCALE = WIDTH / 0.085  # pixels per second
SHADES = {"gather": "#5a9e6f", "reduce": "#9b6fb5", "forward": COLOURS[0], "backward": COLOURS[1]}


def rows(top: float) -> list[str]:
    """Return the row of a unit, and which device holds what of it."""
    total = sum(PARAMETERS.values())
    scale = WIDTH / total
    drawn = [text(0, top, "the parameters of a unit lie in one row, which is cut by memory, here 2:1", bold=True)]
    y = top + 12
    drawn.append(text(0, y + 18, "row"))
    for (name, size), begin in zip(PARAMETERS.items(), accumulate(PARAMETERS.values(), initial=0), strict=False):
        words = name if size * scale > 60 else ""
        drawn.append(bar(LEFT + begin * scale, y, max(size * scale - 2, 2), GREY, words, solid=bool(words)))
    bounds = Cutter(WEIGHTS).cut(total).bounds
    for rank, (begin, end) in enumerate(pairwise(bounds)):
        y = top + 12 + (rank + 1) * (HEIGHT + 8)
        drawn.append(text(0, y + 18, f"device {rank}"))
        drawn.append(bar(LEFT, y, WIDTH - 2, GREY, solid=False))
        words = f"{end - begin} of {total} numbers"
        drawn.append(bar(LEFT + begin * scale, y, (end - begin) * scale - 2, COLOURS[rank], words))
    return drawn


def step(top: float) -> list[str]:
    """Return what the link and a device do in a step."""
    drawn = [text(0, top, "a step: while a unit is used, the next is gathered and the last is reduced", bold=True)]
    for line, (name, kinds) in enumerate([("link", ("gather", "reduce")), ("device", ("forward", "backward"))]):
        y = top + 12 + line * (HEIGHT + 8)
        drawn.append(text(0, y + 18, name))
        for event in STEP.events():
            if event.kind in kinds:
                x, width = LEFT + event.begin_s * SCALE, (event.end_s - event.begin_s) * SCALE
                drawn.append(bar(x, y, width - 2, SHADES[event.kind], str(event.unit)))
    y = top + 12 + 2 * (HEIGHT + 8)
    drawn.append(text(0, y + 18, "whole"))
    for unit, begin, end in whole():
        lane = y + (unit % 2) * (HEIGHT / 2 + 1)
        x, width = LEFT + begin * SCALE, (end - begin) * SCALE
        shape = f'<rect x="{x:.1f}" y="{lane:.1f}" width="{width - 2:.1f}" height="{HEIGHT / 2 - 1:.1f}" rx="3"'
        drawn.append(f'{shape} fill="{GREY}"/>')
        drawn.append(text(x + width / 2, lane + 11, str(unit), anchor="middle", colour="#ffffff"))
    y += HEIGHT + 26
    x = float(LEFT)
    for kind, colour in SHADES.items():
        drawn.append(f'<rect x="{x:.0f}" y="{y - 11:.0f}" width="12" height="12" rx="2" fill="{colour}"/>')
        drawn.append(text(x + 18, y, kind))
        x += 100
    drawn.append(text(LEFT, y + 22, f"{STEP.step_s * 1e3:.0f} ms, of which the device computes {STEP.own_s * 1e3:.0f}"))
    return drawn


def whole() -> list[tuple[int, float, float]]:
    """Return from when until when each unit is whole: from a gather to the end of the use that follows."""
    events = STEP.events()
    uses = [event for event in events if event.kind in ("forward", "backward")]
    gathers = [event for event in events if event.kind == "gather"]
    return [(use.unit, gather.begin_s, use.end_s) for gather, use in zip(gathers, uses, strict=True)]


def picture() -> str:
    """Return the picture."""
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 0 720 310" font-family="sans-serif" font-size="14"'
        ' role="img" aria-label="Ragged shards of two devices, and a step with overlapping transfers">\n'
        + "\n".join([*rows(20), *step(160)])
        + "\n</svg>\n"
    )


def main() -> None:
    """Write the picture."""
    Path(__file__).with_name("images").joinpath("shards.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
