"""The command as users call it, and its page in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from run_records import PIPELINE, TWO, write

from lightning_hetero.command.main import main

TIMEOUT_S = 120
COMMAND = Path(sysconfig.get_path("scripts")) / "lightning-hetero"


def report(*arguments: str | Path, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Call the command in ``directory``."""
    return subprocess.run(
        [COMMAND, "report", *map(str, arguments)],
        cwd=directory,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def test_without_arguments_the_newest_run_is_shown(tmp_path: Path) -> None:
    newest = write(tmp_path / "lightning_logs" / "version_1" / "hetero_run.jsonl")
    for place in ("lightning_logs/version_0/hetero_run.jsonl", "lightning_logs/.hidden/hetero_run.jsonl"):
        os.utime(write(tmp_path / place, TWO[:1]), (1, 1) if "0" in place else None)
    write(tmp_path / "elsewhere" / "hetero_run.jsonl", TWO[:1])
    done = report(directory=tmp_path)
    page = newest.with_name("hetero_report.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{page}\n", "")
    assert ">finished<small>" in page.read_text(encoding="utf-8")
    assert sorted(path.name for path in page.parent.iterdir()) == ["hetero_report.html", "hetero_run.jsonl"]


@pytest.mark.parametrize(
    ("run", "page"),
    [
        (".", "top/hetero_report-1.html"),
        ("top", "top/hetero_report-1.html"),
        ("top/below", "top/below/hetero_report.html"),
        ("top/hetero_run.jsonl", "top/hetero_report.html"),
        ("top/renamed", "top/hetero_report.html"),
    ],
)
def test_the_meaning_of_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], run: str, page: str
) -> None:
    # from old to new; a record directly in a directory is preferred to newer ones below it
    for age, name in enumerate(["hetero_run.jsonl", "below/hetero_run.jsonl", "hetero_run-1.jsonl", "renamed"]):
        os.utime(write(tmp_path / "top" / name), (1000 + age, 1000 + age))
    if run == "top":
        os.utime(tmp_path / "top/below/hetero_run.jsonl", (2000, 2000))
    monkeypatch.chdir(tmp_path)
    assert main(["report", run]) == 0
    assert capsys.readouterr().out == f"{tmp_path / page}\n"
    assert (tmp_path / page).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere, which does not exist"),
        (["x" * 5000], "does not exist"),
        (["/dev/null"], "which is neither"),
        (["empty"], "`LoadBalancer`, which `hetero_ddp` adds, writes hetero_run*.jsonl"),
        (["other.jsonl"], "other.jsonl must be the record of a run"),
        (["void"], "empty file"),
        (["damaged"], "damaged must have one JSON object per line, got something else in line 2"),
        (["good", "--output", "empty"], "`--output` must be a file"),
        (["good", "--output", "/dev/null"], "`--output` must be a file"),
        (["good", "--output", "nowhere/page.html"], "that can be written"),
        (["good", "--output", "good"], "must not be the record itself"),
        (["good", "--interval", "0"], "`--interval` must be from 0.1"),
        (["good", "--interval", "nan"], "`--interval` must be from 0.1"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_bytes(b"\x80\xff\n")
    write(tmp_path / "void", [])
    write(tmp_path / "damaged", [TWO[0], TWO[1][:-9], TWO[2]])
    good = write(tmp_path / "good").read_bytes()
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "good").read_bytes() == good


def test_without_a_record_the_error_says_what_writes_one(tmp_path: Path) -> None:
    done = report(directory=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"found no hetero_run*.jsonl below {tmp_path}. `LoadBalancer`" in done.stderr


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    code = (
        f"import sys, lightning_hetero.command.main as command; sys.modules[{missing!r}] = None;"
        "sys.exit(command.main(['report', 'hetero_run.jsonl']))"
    )
    write(tmp_path / "hetero_run.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "pip install 'lightning-hetero[report]'" in done.stderr


def wait_for(page: Path, text: str, follower: subprocess.Popen[str]) -> str:
    """Return the page once it has ``text``."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until and follower.poll() is None:
        if page.exists() and text in (html := page.read_text(encoding="utf-8")):
            return html
        time.sleep(0.05)
    raise AssertionError(f"the page never had {text}; the command ended with {follower.poll()}")


@pytest.mark.parametrize("by", ["end", "Ctrl-C"])
def test_a_run_is_followed_until_it_ends(tmp_path: Path, by: str) -> None:
    record = write(tmp_path / "hetero_run.jsonl", TWO[:1])
    page = tmp_path / "page.html"
    follower = subprocess.Popen(
        [COMMAND, "report", record, "--follow", "--interval", "0.2", "--output", page],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that starts the tests in the background makes them and their children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  # no threads here
    )
    try:
        assert 'http-equiv="refresh"' in wait_for(page, 'id="nothing"', follower)
        with record.open("a") as lines:
            lines.write("\n".join(TWO[1:-1]) + "\n" + TWO[-1][:20])
        assert 'http-equiv="refresh"' in wait_for(page, 'id="time-line"', follower)
        if by == "end":
            with record.open("a") as lines:
                lines.write(TWO[-1][20:] + "\n")
        else:
            follower.send_signal(signal.SIGINT)
        out, err = follower.communicate(timeout=TIMEOUT_S)
    finally:
        follower.kill()
    assert (follower.returncode, out, err) == (0 if by == "end" else 130, f"{page}\n", "")
    html = page.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in html
    assert (">finished<small>" if by == "end" else ">no end recorded<small>") in html


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Show a page in a browser without network access."""
    assert BROWSER is not None
    return subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr",
            f"--user-data-dir={page.parent / 'profile'}",
            "--window-size=1200,1600",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")
@pytest.mark.parametrize(
    ("lines", "sections"),
    [
        (TWO, ["advice", "time-line", "shares", "efficiency", "step-times", "memory", "ranks"]),
        (PIPELINE, ["advice", "stages", "passes", "ranks"]),
    ],
    ids=["hetero_ddp", "hetero_pipeline"],
)
def test_a_browser_shows_the_page(tmp_path: Path, lines: list[str], sections: list[str]) -> None:
    hostile = lines[0].replace("node-0", "<script>document.title='taken'</script>")
    record = write(tmp_path / "hetero_run.jsonl", [hostile, *lines[1:]])
    assert main(["report", str(record)]) == 0
    page = tmp_path / "hetero_report.html"
    seen = browse(page, "--dump-dom")
    assert re.findall(r'<section id="([\w-]+)"', seen.stdout) == sections
    assert re.search(r"<title>hetero_\w+ on \d ranks: [\w ]+</title>", seen.stdout)
    assert [line for line in seen.stderr.splitlines() if "CONSOLE" in line] == []


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_the_page_is_drawn_in_its_colours(tmp_path: Path) -> None:
    from matplotlib.image import imread

    assert main(["report", str(write(tmp_path / "hetero_run.jsonl"))]) == 0
    picture = tmp_path / "page.png"
    browse(tmp_path / "hetero_report.html", f"--screenshot={picture}")
    pixels = (imread(picture)[..., :3] * 255).round().astype(int)
    assert pixels.shape == (1600, 1200, 3)
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # own time and waiting
        assert (abs(pixels - colour).max(axis=-1) <= 2).sum() > 5000


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")
def test_the_console_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<script>console.error('broken')</script>", encoding="utf-8")
    assert any("CONSOLE" in line and "broken" in line for line in browse(page, "--dump-dom").stderr.splitlines())
