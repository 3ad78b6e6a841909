"""Draw docs/images/how_it_works.svg: one step of two ranks, and how a global batch becomes mini-batches.

    python docs/draw_how_it_works.py

The times are those of two devices that take 10 ms plus 1.2 ms per sample, and 10 ms plus 2.4 ms per sample. The package
computes the plan and the slices. Colours are readable on white and on black.
"""

from __future__ import annotations

from pathlib import Path

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, proportional_plan, solve_batch
from lightning_hetero.balance.batch.sharding import positions_of_rank
from lightning_hetero.balance.types import BatchPlan, StepTime

COLOURS = ("#3b82c4", "#d97a2b")
GREY = "#8a8f98"
TIMES = (StepTime(0.010, 0.0012), StepTime(0.010, 0.0024))
LEFT, SCALE = 110, 2900.0  # pixels, pixels per second
HEIGHT = 26


def text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = GREY, bold: bool = False) -> str:
    """Return one line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="{colour}"{weight}>{words}</text>'


def bar(x: float, y: float, width: float, colour: str, words: str = "", *, solid: bool = True) -> str:
    """Return a rectangle with words in it; not solid for waiting."""
    fill = f'fill="{colour}"' if solid else f'fill="none" stroke="{colour}" stroke-dasharray="4 3"'
    shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{HEIGHT}" rx="3" {fill}/>'
    inside = "#ffffff" if solid else colour
    return shape + (text(x + width / 2, y + 18, words, anchor="middle", colour=inside) if words else "")


def step(title: str, plan: BatchPlan, top: float) -> list[str]:
    """Return one step of each rank under ``plan``."""
    end_s = predicted_step_s(TIMES, plan)
    drawn = [text(0, top, title, bold=True)]
    for rank, (time, samples) in enumerate(zip(TIMES, plan.samples, strict=True)):
        y, own_s = top + 12 + rank * (HEIGHT + 8), time.seconds(samples)
        drawn.append(text(0, y + 18, f"rank {rank}"))
        drawn.append(bar(LEFT, y, own_s * SCALE, COLOURS[rank], f"{samples} samples, {own_s * 1e3:.0f} ms"))
        if (end_s - own_s) * SCALE > 40:
            drawn.append(bar(LEFT + own_s * SCALE + 3, y, (end_s - own_s) * SCALE - 3, GREY, "waits", solid=False))
    bottom = top + 12 + 2 * (HEIGHT + 8)
    x = LEFT + end_s * SCALE + 6
    drawn.append(f'<line x1="{x:.0f}" y1="{top + 6:.0f}" x2="{x:.0f}" y2="{bottom:.0f}" stroke="{GREY}"/>')
    drawn.append(text(x + 6, top + 44, f"{end_s * 1e3:.0f} ms"))
    return drawn


def slices(top: float) -> list[str]:
    """Return a small global batch and whose its samples are."""
    size, cell = 12, 38
    drawn = [text(0, top, "the same global batch, in the order of the epoch", bold=True)]
    for line, (name, plan) in enumerate([("ddp", BatchPlan((6, 6))), ("hetero_ddp", proportional_plan([2, 1], size))]):
        y = top + 12 + line * (HEIGHT + 8)
        drawn.append(text(0, y + 18, name))
        owner = {p: rank for rank in range(2) for p in positions_of_rank(plan, rank)}
        drawn += [bar(LEFT + p * cell, y, cell - 3, COLOURS[owner[p]], str(p)) for p in range(size)]
    y = top + 12 + 2 * (HEIGHT + 8) + 14
    drawn.append(text(LEFT, y, "sample k of the block; blue goes to rank 0, orange to rank 1"))
    return drawn


def picture() -> str:
    """Return the picture."""
    equal, found = BatchPlan((64, 64)), solve_batch(TIMES, 128)
    drawn = [
        *step("ddp: equal mini-batches, the fast rank waits", equal, 20),
        *step("hetero_ddp: mini-batches in proportion to speed, both are done together", found, 130),
        *slices(240),
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="-10 0 720 350" font-family="sans-serif" font-size="14"'
        ' role="img" aria-label="Equal and proportional mini-batches">\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def main() -> None:
    """Write the picture."""
    Path(__file__).with_name("images").joinpath("how_it_works.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
