"""The page shows what the record says, whatever that is."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from profiles import drawn
from run_records import PIPELINE, TWO, TWO_COSTS_S, batch_run, header, pipeline_run

from lightning_hetero.balance.record.run_record import (
    RunAdvice,
    RunChange,
    RunHeader,
    RunPasses,
    RunStages,
    RunWindow,
    to_line,
)
from lightning_hetero.balance.record.run_record_parser import parse_record
from lightning_hetero.balance.types import DeviceProfile
from lightning_hetero.command.report import page as page_module
from lightning_hetero.command.report.page import build
from lightning_hetero.command.report.pipeline_charts import passes_chart, recorded_passes
from lightning_hetero.exceptions import ConfigurationError, HeteroError

BATCH_SECTIONS = ["advice", "time-line", "shares", "efficiency", "step-times", "memory", "ranks"]
PIPELINE_SECTIONS = ["advice", "stages", "passes", "ranks"]


class Page(HTMLParser):
    """The elements of a page; parsing fails if tags do not match."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for attributes in self.of("section")]


def page_of(lines: list[str], refresh_s: float | None = None) -> tuple[str, Page]:
    html = build(parse_record(lines), refresh_s)
    html.encode()
    # nothing is loaded: the namespaces of SVG are the only addresses
    assert set(re.findall(r"https?://[^\"' <]*", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    page = Page(html)
    assert not page.of("script")
    ids = [attributes["id"] for _, attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))
    # every reference has a target
    references = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", html))
    assert references <= set(ids)
    return html, page


@pytest.mark.parametrize(
    ("lines", "sections", "figures"), [(TWO, BATCH_SECTIONS, 5), (PIPELINE, PIPELINE_SECTIONS, 2)], ids=["ddp", "pipe"]
)
def test_all_sections_are_there_and_accessible(lines: list[str], sections: list[str], figures: int) -> None:
    html, page = page_of(lines)
    assert page.sections == sections
    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("svg")) == figures
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in page.of("svg"))
    assert [tag for tag, _ in page.attributes if tag in ("h1", "h2", "h3")] == ["h1"] + ["h2"] * len(sections)
    assert html == build(parse_record(lines))  # the same record gives the same page


def test_the_numbers_are_those_of_the_record() -> None:
    html, _ = page_of(TWO)
    # 128 samples in 64 * 2 ms + 7 ms, then in 86 * 1 ms + 7 ms or 42 * 2 ms + 7 ms
    before, after = 128 / 0.135, 128 / 0.093
    assert f"{before:,.0f} <span" in html
    assert f"</span> {after:,.0f}<small>" in html
    assert f"<dd>{after / before:.2f}x<small>over equal shares" in html
    assert "predicted: 1.48x as many samples/s" in html
    assert "without rank 1 a step would be 9% faster" in html
    assert re.search(r"<td>64 .*→.* 86</td><td>68.0 .* 90.0</td><td>67.0 .* 3.00</td><td>50% .* 3%</td>", html)
    assert "rank 0, 86 samples, own time: 90 ms" in html


def test_a_pipeline_shows_its_stages() -> None:
    html, page = page_of(PIPELINE)
    assert "7 (0 to 6)" in html
    assert "<td>20.0</td><td>40.0</td>" in html
    assert "410.0 ms<small>533.0 ms with equal numbers of layers" in html
    assert "stage 2, backward pass of micro-batch 3: 38 ms" in html
    assert {"Predicted step", "Recorded step 5"} <= set(page.text)


def test_a_pipeline_whose_layers_have_moved_shows_the_stages_of_the_recorded_step_and_the_latest() -> None:
    first, *rest = pipeline_run()
    assert isinstance(first, RunStages)
    moved = replace(
        first, step=70, ends=(5, 10, 12), ranks=(2, 1, 0), sentences=("layers have moved before step 70: b",)
    )
    again = replace(moved, step=90, ends=(6, 10, 12), sentences=("layers have moved before step 90: c",))
    lines = [PIPELINE[0], *map(to_line, (first, *rest, moved, again))]
    assert parse_record(lines).earlier_stages == (first, moved)
    html, page = page_of(lines)
    assert "6 (0 to 5)" in html
    assert "stage 0 (rank 1)" in page.text  # of the step that was recorded before
    assert html.index("before step 90: c") < html.index("before step 70: b")


def test_a_thousand_ranks_are_few_bytes() -> None:
    costs_s = [0.001 + 0.000003 * rank for rank in range(1000)]
    names = [f"kind {rank % 11}" for rank in range(1000)]
    html, page = page_of([to_line(header(names)), *map(to_line, batch_run(costs_s, windows=40))])
    assert len(html.encode()) < 3_000_000
    assert page.sections == BATCH_SECTIONS
    assert html.count("Of 1000 ranks, the 16 slowest and the 16 fastest are shown.") == 4
    assert "rank 999, 34 samples" in html
    assert "rank 500, " not in html
    assert html.count("<td>500</td>") == 1  # its row in the table


def test_ranks_whose_speed_is_not_known_are_not_called_slow() -> None:
    """A resumed run has shares before it has measured anything."""
    change = RunChange(0, 0.1, (64,) * 40, "resumed")
    html, page = page_of([to_line(header([f"kind {rank}" for rank in range(40)])), to_line(change)])
    assert page.sections == ["nothing", "shares", "ranks"]
    assert "Of 40 ranks, the first 16 and the last 16 are shown." in html
    assert "slowest" not in html


def test_what_was_not_measured_has_no_chart() -> None:
    """As the memory of processors."""
    first, *_ = batch_run(TWO_COSTS_S)
    assert isinstance(first, RunWindow)
    _, page = page_of([TWO[0], to_line(replace(first, peak_bytes=(0.0, 0.0), budget_bytes=()))])
    assert page.sections == ["time-line", "shares", "efficiency", "step-times", "ranks"]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(119.9, "119.9 s"), (120.0, "2 min 0 s"), (3999.6, "66 min 40 s"), (90_061.0, "25 h 1 min")]
)
def test_long_times_are_in_minutes_and_hours(seconds: float, shown: str) -> None:
    assert page_module._duration(seconds) == shown


@pytest.mark.parametrize(
    ("lines", "state", "sections"),
    [
        (TWO[:1], "no end recorded", ["nothing", "ranks"]),
        (TWO[:2], "no end recorded", ["time-line", "shares", "efficiency", "step-times", "memory", "ranks"]),
        ([*TWO[:-1], TWO[-1][:-7]], "no end recorded", BATCH_SECTIONS),
        ([*TWO[:-1], to_line(batch_run(TWO_COSTS_S, 1, "RuntimeError: <b>&")[-1])], "failed", BATCH_SECTIONS),
        (PIPELINE[:2], "no end recorded", PIPELINE_SECTIONS),
    ],
    ids=["header only", "one window", "cut off", "failed", "not recorded"],
)
def test_a_page_shows_what_the_record_has(lines: list[str], state: str, sections: list[str]) -> None:
    html, page = page_of(lines)
    assert f">{state}<small>" in html
    assert page.sections == sections
    assert ("RuntimeError: &lt;b&gt;&amp;" in html) == (state == "failed")


def test_a_browser_reloads_the_page_only_while_the_run_continues() -> None:
    html, page = page_of(TWO[:-1], refresh_s=5.0)
    assert {"http-equiv": "refresh", "content": "5"} in page.of("meta")
    assert ">watching<small>" in html
    assert "refresh" not in page_of(TWO)[0]


HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "$\\frac{1}{0$ {{ 7 * 7 }} {% raw %}",
    "_hidden\x00\x1b[31m\ud800 \N{GRINNING FACE}" + "long" * 5000,
    "font: 1px 'x id='tip-0' style=\"font: 1px 'x",
    "</svg></style><style>*{display:none}</style>",
    "",
]


@pytest.mark.parametrize("world_size", [len(HOSTILE), 40], ids=["a colour a rank", "a colour a model"])
def test_texts_of_the_record_are_texts(world_size: int) -> None:
    events = batch_run([0.001] * world_size, windows=2, reason=" ".join(HOSTILE))
    events[1:3] = [
        *(RunChange(7 + i, 0.7, (64,) * world_size, text) for i, text in enumerate(HOSTILE)),
        RunAdvice(9, 0.9, 0.1, 1.0, 1.0, tuple(HOSTILE)),
    ]
    devices = tuple(DeviceProfile(text, text, text) for text in (HOSTILE * 40)[:world_size])
    hostile = RunHeader(HOSTILE[0], HOSTILE[1], 64 * world_size, devices, HOSTILE[2])
    html, page = page_of([to_line(hostile), *map(to_line, events)])
    assert page.sections == BATCH_SECTIONS
    assert not page.of("script")
    assert not page.of("img")
    assert len(page.of("style")) == 1 + len(page.of("svg"))
    assert not any(name.startswith("on") for _, attributes in page.attributes for name in attributes)
    assert "{{ 7 * 7 }}" in "".join(page.text)
    assert "\x00" not in html


def test_many_changes_do_not_make_the_page_long() -> None:
    changes = [to_line(RunChange(10 + i, 1.0, (64 + i % 3, 64 - i % 3), f"change of try {i}")) for i in range(3000)]
    html, _ = page_of([TWO[0], TWO[1], *changes, *TWO[-3:]])
    assert "Of 3000 changes, 200 are listed." in html
    assert "change of try 2999" in html
    assert len(html) < 1_000_000


def test_numbers_that_no_run_has_are_an_error() -> None:
    (window, *_) = batch_run(TWO_COSTS_S)
    assert isinstance(window, RunWindow)
    with pytest.raises(ConfigurationError, match="`it` must have numbers below 1e\\+18"):
        build(parse_record([TWO[0], to_line(replace(window, own_s=(1e200, 1.0)))]), name="`it`")


NUMBERS = st.sampled_from([0.0, 1e-300, 1e-9, 1.0, 1e9, 1e18])
PAIRS = st.tuples(NUMBERS, NUMBERS)
MAX_WHOLE = 2**53 - 1  # the parser refuses larger integers


# building a page takes too long to shrink examples
@settings(max_examples=drawn(5, 30), phases=[Phase.generate])
@given(
    st.tuples(st.integers(0, MAX_WHOLE), st.integers(0, 2)),
    PAIRS,
    PAIRS,
    PAIRS,
    PAIRS,
    PAIRS,
    NUMBERS,
    st.integers(0, 9),
)
def test_any_numbers_make_a_page(
    samples: tuple[int, int],
    own_s: tuple[float, float],
    waiting_s: tuple[float, float],
    overhead_s: tuple[float, float],
    cost_s: tuple[float, float],
    peak_bytes: tuple[float, float],
    communication_s: float,
    step: int,
) -> None:
    window = RunWindow(
        step, 1.0, True, samples, own_s, waiting_s, (0.0, 0.0), overhead_s, cost_s, communication_s, peak_bytes
    )
    change = RunChange(5, 1.0, samples[::-1], "")
    page_of([TWO[0], to_line(window), to_line(change), to_line(replace(window, step=MAX_WHOLE, tuning=False))])


def test_a_huge_schedule_is_not_simulated() -> None:
    endless = PIPELINE[1].replace('"micro_batches":4', '"micro_batches":1000000000')
    _, page = page_of([PIPELINE[0], endless])
    assert page.sections == ["advice", "stages", "ranks"]
    with pytest.raises(HeteroError):
        page_of([PIPELINE[0], PIPELINE[1].replace('"micro_batches":4', '"micro_batches":1e3')])


def test_parts_of_a_backward_pass_have_names_and_colours() -> None:
    kinds = ("forward", "input", "weight")
    passes = RunPasses(5, 3.0, (0, 0, 0), kinds, (0, 0, 0), (0.0, 0.1, 0.2), (0.1, 0.2, 0.3))
    chart = str(passes_chart("p", "A step", recorded_passes(passes), [0], 0.3))
    for name in ("forward pass", "gradient of the input", "gradients of parameters"):
        assert f"{name} of micro-batch 0" in chart
    assert "backward pass of micro-batch" not in chart
