"""``lightning-hetero plan``: its predictions for good files, and one line of error for each wrong one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_hetero.balance.batch.batch_solver import predicted_step_s, solve_batch
from lightning_hetero.balance.types import BatchLimits, StepTime
from lightning_hetero.command.main import main

EXAMPLES = Path(__file__).parents[3] / "examples"

DEVICE = "  - {name: A, count: 2, samples_per_s: 400}\n"
GOOD = "global_batch_size: 64\ndevices:\n" + DEVICE
PIPELINE = "strategy: hetero_pipeline\nlayers: 12\nlayer_milliseconds: 3\ndevices:\n"
SPEEDS = "  - {name: A, speed: 2}\n  - {name: B, speed: 1}\n"
MEASURED = {"overhead_s": 0.01, "seconds_per_sample": 0.002, "samples_per_s": 500.0, "workload": "a small CNN"}


def probe(*devices: dict[str, Any]) -> str:
    defaults = {"name": "A100", "memory_bytes": None, "nominal_speed": None, "measured": None}
    listed = [defaults | {"device": f"cuda:{i}"} | one for i, one in enumerate(devices)]
    return json.dumps({"lightning_hetero_probe": 1, "host": "node", "devices": listed, "shares": [1] * len(devices)})


def plan(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    file = tmp_path / "cluster.yaml"
    file.write_text(text, encoding="utf-8")
    status = main(["plan", str(file), *arguments])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return printed.out


def document(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(plan(tmp_path, text, capsys, "--json"))


def mistake(tmp_path: Path, text: str | bytes, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of the command for a wrong file, after the name of the file."""
    file = tmp_path / "cluster.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    assert main(["plan", str(file)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    start = f"lightning-hetero plan: error: {file}"
    assert printed.err.startswith(start)
    return printed.err.removeprefix(start).strip(": \n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "global_batchsize: 3", "`global_batchsize` is not a known key. Did you mean `global_batch_size`?"),
        (GOOD + "zzz: 3", "`zzz` is not a known key. Known keys are batch_multiple, batch_size, devices,"),
        (GOOD + "7: 3", "`7` is not a known key."),
        (GOOD + "layers: 3", "`layers` must be left out with `strategy: hetero_ddp`, because only"),
        (GOOD + "strategy: ddp", "must be one of hetero_ddp, hetero_fsdp, hetero_pipeline, auto, got 'ddp'"),
        (GOOD + "strategy: [1]", "one of hetero_ddp, hetero_fsdp, hetero_pipeline, auto, got a list of"),
        ("devices:\n" + DEVICE, "`global_batch_size` must be a whole number of at least 1 and at most 1000000000, it"),
        ("global_batch_size: 0\ndevices:\n" + DEVICE, "`global_batch_size` must be a whole number of at least 1 and"),
        ("global_batch_size: 1.5\ndevices:\n" + DEVICE, "`global_batch_size` must be a whole number of at least 1 and"),
        ("global_batch_size: yes\ndevices:\n" + DEVICE, "at most 1000000000, got True."),
        ("global_batch_size: '64'\ndevices:\n" + DEVICE, "at most 1000000000, got '64'."),
        ("global_batch_size: 1\ndevices:\n" + DEVICE, "`global_batch_size` must give each of the 2 devices at least"),
        ("global_batch_size: 64", "`devices` must be a list with one entry for each kind of device, it is missing."),
        ("global_batch_size: 64\ndevices: []", "for each kind of device, got a list of 0."),
        ("global_batch_size: 64\ndevices: {a: 1}", "for each kind of device, got a mapping of 1."),
        (GOOD + "  - 3", "`devices[1]` must be a mapping of keys to values, got 3."),
        (GOOD + "  - ", "`devices[1]` must be a mapping of keys to values, got nothing."),
        (GOOD + "  - {name: B, samples_per_sec: 3}", "`devices[1].samples_per_sec` is not a known key. Did you mean"),
        (GOOD + "  - {name: B}", "`devices[1]` must say how fast the device is with exactly one of samples_per_s,"),
        (GOOD + "  - {name: B, speed: 1, samples_per_s: 3}", "it has samples_per_s and speed."),
        (GOOD + "  - {samples_per_s: 3}", "`devices[1].name` must be a line of text, it is missing."),
        (GOOD + "  - {name: 3090, samples_per_s: 3}", "must be a line of text, got 3090. Put it in quotes."),
        (GOOD + '  - {name: "a\\eb", samples_per_s: 3}', "`devices[1].name` must be a line of text, got 'a\\x1bb'."),
        (GOOD + "  - {name: B, samples_per_s: 0}", "`devices[1].samples_per_s` must be a number above 0, got 0."),
        (GOOD + "  - {name: B, samples_per_s: fast}", "`devices[1].samples_per_s` must be a number above 0, got 'fas"),
        (GOOD + "  - {name: B, samples_per_s: .nan}", "`devices[1].samples_per_s` must be a number above 0, got nan."),
        (GOOD + "  - {name: B, samples_per_s: .inf}", "`devices[1].samples_per_s` must be a number above 0, got inf."),
        (GOOD + f"  - {{name: B, samples_per_s: 1{'0' * 400}}}", "`devices[1].samples_per_s` must be a number above 0"),
        (GOOD + "  - {name: B, milliseconds_per_sample: -1}", "`devices[1].milliseconds_per_sample` must be a number"),
        (GOOD + "  - {name: B, samples_per_s: 1, overhead_ms: -1}", "overhead_ms` must be a number that is not negat"),
        (GOOD + "  - {name: B, speed: 1, overhead_ms: 1}", "`devices[1].overhead_ms` must be left out with `speed`"),
        (GOOD + "  - {name: B, samples_per_s: 1, count: two}", "`devices[1].count` must be a whole number of at leas"),
        (GOOD + "  - {name: B, samples_per_s: 1, count: 1000000}", "`devices` must be at most 1000000 in total, got"),
        (GOOD + "  - {name: B, samples_per_s: 1, max_batch_size: 0}", "`devices[1].max_batch_size` must be a whole n"),
        (GOOD + "  - {name: B, samples_per_s: 1, memory_gigabytes: 0}", "memory_gigabytes` must be a number above 0"),
        (GOOD + "  - {name: B, samples_per_s: 1, price_per_hour: -1}", "price_per_hour` must be a number that is not"),
        (GOOD + "  - {name: B, samples_per_s: 1, price_per_hour: 1}", "`price_per_hour` must be given for all devices"),
        (GOOD + "  - {name: B, speed: 1}", "`devices` must all have times, or all have relative speeds"),
        (GOOD + "batch_multiple: 0", "`batch_multiple` must be a whole number of at least 1"),
        (GOOD + "link_gigabits_per_s: 10", "`gradient_megabytes` or `parameters` must be given with"),
        (GOOD + "link_gigabits_per_s: 0\nparameters: 1", "`link_gigabits_per_s` must be a number above 0, got 0."),
        (GOOD + "latency_us: -1", "`latency_us` must be a number that is not negative, got -1."),
        (GOOD + "parameters: 1\ngradient_megabytes: 1", "it has gradient_megabytes and parameters."),
        (GOOD + "parameters: []", "`parameters` must be a number, or a list with one number for each parameter,"),
        (GOOD + "gradient_megabytes: [1, x]", "`gradient_megabytes[1]` must be a number that is not negative, got 'x"),
        (GOOD + "memory_megabytes_fixed: 10", "`memory_megabytes_per_sample` must be given with"),
        (GOOD + "memory_megabytes_per_sample: 0", "`memory_megabytes_per_sample` must be a number above 0, got 0."),
        (
            GOOD + "  - {name: B, samples_per_s: 1, memory_gigabytes: 1}\nmemory_megabytes_per_sample: 2000",
            "B must hold at least `batch_multiple` samples (1), but its memory or `max_batch_size` allows 0.",
        ),
        (
            "global_batch_size: 64\ndevices:\n  - {name: A, count: 2, samples_per_s: 4, max_batch_size: 31}",
            "must together hold the global batch of 64 samples, got 2 devices that hold 62 in multiples of 1.",
        ),
        (
            "global_batch_size: 64\ndevices:\n  - {name: A, speed: 4}\nparameters: 3\nlink_gigabits_per_s: 1",
            "`link_gigabits_per_s` must be left out if only relative speeds are known, got 1.",
        ),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert message in mistake(tmp_path, text, capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PIPELINE, "`devices` must be a list with one entry for each kind of device, got nothing."),
        (PIPELINE + "  - {name: A}", "`devices[0].speed` must be a number above 0, it is missing."),
        (PIPELINE + "  - {name: A, speed: 1, count: 13}", "at least one layer per device, got 13 devices and 12"),
        (PIPELINE.replace("12", "99") + "  - {name: A, speed: 1, count: 65}", "at most 64 devices to be predicted, g"),
        (PIPELINE + SPEEDS + "layers: 3", "must be YAML, got line 7, column 1: the key 'layers' appears twice"),
        (PIPELINE + SPEEDS + "num_microbatches: 0", "`num_microbatches` must be a whole number of at least 1 and"),
        (PIPELINE + SPEEDS + "batch_size: 2", "`batch_size` must be at least `num_microbatches` (4), got 2."),
        (PIPELINE + SPEEDS + "schedule: zb", "`schedule` must be one of 1f1b, gpipe, got 'zb'."),
        (PIPELINE + SPEEDS + "global_batch_size: 3", "must be left out with `strategy: hetero_pipeline`"),
        (PIPELINE.replace("layer_milliseconds: 3\n", "") + SPEEDS, "`layer_milliseconds` must be a number above 0, i"),
        (PIPELINE.replace("layers: 12", "layers: x") + SPEEDS, "`layers` must be a whole number of at least 1"),
        (PIPELINE.replace("layers: 12", "layers: [1]") + SPEEDS, "`layer_milliseconds` must be left out with a list"),
        ("strategy: hetero_pipeline\nlayers: [1]\ndevices:\n" + SPEEDS, "`layers[0]` must be a mapping"),
        ("strategy: hetero_pipeline\nlayers: []\ndevices:\n" + SPEEDS, "`layers` must be a list with one entry for ea"),
        ("strategy: hetero_pipeline\ndevices:\n" + SPEEDS, "`layers` must be the number of equal layers, or a list"),
        ("strategy: hetero_pipeline\nlayers: [" + "0," * 4097 + "]\ndevices:\n" + SPEEDS, "at most 4096 entries"),
        (
            "strategy: hetero_pipeline\nlayers:\n  - {forward_ms: 1, backwards_ms: 2}\ndevices:\n" + SPEEDS,
            "`layers[0].backwards_ms` is not a known key. Did you mean `backward_ms`?",
        ),
        (
            PIPELINE + "  - {name: A, speed: 1, memory_gigabytes: 1}\nlayer_parameter_megabytes: 100",
            "The layers must fit into the memory of 1 rank",
        ),
    ],
)  # fmt: skip
def test_a_wrong_pipeline_is_named_with_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert message in mistake(tmp_path, text, capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must describe a cluster, but it is empty."),
        (b"# nothing\n", "must describe a cluster, but it is empty."),
        (b"- 1\n- 2\n", "The file must be a mapping of keys to values, got a list of 2."),
        (b"hello", "The file must be a mapping of keys to values, got 'hello'."),
        (b"a: [1", "must be YAML, got line 1, column 6: expected ',' or ']'"),
        (b"a: b: c", "must be YAML, got line 1, column 5: mapping values are not allowed here."),
        (b"a: &x [*x]\ndevices: *y", "must be YAML, got line 2, column 10: found undefined alias 'y'."),
        (b"\x89PNG\r\n\x1a\n\xff\xd8", "must be a text file in UTF-8, got other bytes."),
        (b"a: \x00", "must be YAML, got special characters are not allowed."),
        (b"a: !!python/object:os.system x", "could not determine a constructor for the tag"),
        (b"a: 2001-99-99", "must be YAML, got month must be in 1..12."),
        (b"[" * 20_000, "must be YAML, got maximum recursion depth exceeded"),
        (b"? {a: 1}\n: 2", "must be YAML, got line 1, column 3: found unhashable key."),
        pytest.param(b"#" * (2**24 + 1), "must be a text file of at most 16 MiB, got more.", id="large"),
    ],
)
def test_a_file_that_describes_no_cluster_is_refused_on_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    assert message in mistake(tmp_path, content, capsys)


def test_a_missing_file_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, message in [(tmp_path / "no.yaml", "does not exist"), (tmp_path, "got a folder")]:
        assert main(["plan", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_the_document_holds_the_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = GOOD + "  - {name: B, milliseconds_per_sample: 5, overhead_ms: 10, max_batch_size: 9}\n"
    found = document(tmp_path, text, capsys)
    times = [StepTime(0, 0.0025)] * 2 + [StepTime(0.01, 0.005)]
    samples = solve_batch(times, 64, BatchLimits((64, 64, 9)), min_samples=1)
    assert found["step_time"] == pytest.approx(predicted_step_s(times, samples))
    assert [device["name"] for device in found["devices"]] == ["A", "B"]
    assert found["devices"][1]["max_samples"] == samples.samples[2] == 9
    assert found["time_unit"] == "s"
    assert found["ddp"] == {"step_time": None, "does_not_fit": "B can hold 9 samples, but an equal share is 21"}
    assert found["speed_up"] is None
    assert found["cost_per_million_samples"] is None
    assert found["notes"] == [
        "communication is ignored; to include it, give link_gigabits_per_s, and gradient_megabytes or parameters"
    ]


def keys_of(document: Any) -> set[str]:
    """Return all keys of a document, at any depth."""
    if isinstance(document, dict):
        return set(document).union(*(keys_of(value) for value in document.values()))
    return set().union(*(keys_of(value) for value in document)) if isinstance(document, list) else set()


@pytest.mark.parametrize("name", ["cluster", "pipeline_cluster", "auto_cluster"])
def test_help_lists_every_key_of_the_document(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / f"{name}.yaml"), "--json"]) == 0
    found = keys_of(json.loads(capsys.readouterr().out))
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    words = set(re.findall(r"\w+", text))
    assert {key.removeprefix("min_").removeprefix("max_") for key in found} <= words


def test_the_example_in_help_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    (text,) = re.findall(r"a minimal cluster.yaml:\n(.*?)\n\n", capsys.readouterr().out, re.DOTALL)
    found = document(tmp_path, text, capsys)
    assert found["world_size"] == 6
    assert found["speed_up"] == pytest.approx((256 / 6) / 90 / (256 / 1160), rel=0.05)


def test_a_list_of_parameters_is_one_bucket_where_one_is_large(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    link = GOOD + "link_gigabits_per_s: 0.2\n"
    whole = document(tmp_path, link + "gradient_megabytes: [2.432, 0.076, 0.076]\n", capsys)
    assert whole["exposed_communication_time"] == pytest.approx(2.584e6 * 8 / 200e6)
    numbers = document(tmp_path, link + "parameters: [608000, 19000, 19000]\n", capsys)
    assert numbers["step_time"] == pytest.approx(whole["step_time"])
    small = document(tmp_path, link + "gradient_megabytes: 2.584\n", capsys)
    assert 0 < small["exposed_communication_time"] < whole["exposed_communication_time"]
    assert small["communication_time"] == pytest.approx(whole["communication_time"])


def test_numbers_with_exponents_are_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(tmp_path, GOOD + "parameters: 1e9\nlink_gigabits_per_s: 1.0e+2\n", capsys)
    assert found["communication_time"] == pytest.approx(0.32)


def test_relative_speeds_have_no_milliseconds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "global_batch_size: 96\ndevices:\n" + SPEEDS.replace("}", ", price_per_hour: 1}")
    found = document(tmp_path, text, capsys)
    assert found["time_unit"] == "relative"
    assert found["step_time"] == pytest.approx(32)
    assert found["speed_up"] == pytest.approx(1.5)
    assert found["cost_per_million_samples"] is None
    printed = plan(tmp_path, text, capsys)
    assert "only relative speeds are known: a unit is the time that the slowest device" in printed
    assert " ms" not in printed


def test_a_probe_brings_devices_names_and_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = MEASURED | {"seconds_per_sample": 0.004}
    (tmp_path / "node.json").write_text(probe({"measured": MEASURED, "memory_bytes": 4e9}, {"measured": slow}))
    found = document(tmp_path, "global_batch_size: 90\ndevices:\n  - {probe: node.json, count: 2}\n", capsys)
    assert [(one["name"], one["count"]) for one in found["devices"]] == [
        ("A100 (node cuda:0)", 2),
        ("A100 (node cuda:1)", 2),
    ]
    assert [one["max_samples"] for one in found["devices"]] == [30, 15]
    assert found["step_time"] == pytest.approx(0.070)
    assert "a small CNN" in found["notes"][0]


def test_a_probe_without_measurements_is_relative(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "node.json").write_text(probe({"nominal_speed": 2e12}, {"nominal_speed": 1e12, "measured": MEASURED}))
    found = document(tmp_path, "global_batch_size: 90\ndevices:\n  - {probe: node.json}\n", capsys)
    assert found["time_unit"] == "relative"
    assert [one["max_samples"] for one in found["devices"]] == [60, 30]
    assert found["step_time"] == pytest.approx(30)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (probe({"measured": MEASURED}, {}), "A100 (node cuda:0) has no nominal speed. Run `lightning-hetero probe --"),
        (probe(), "must list at least one device, got none."),
        (probe({"measured": {}}), "got a damaged one: `workload` must be present"),
        (probe({"measured": MEASURED | {"overhead_s": -1}}), "`overhead_s` must be finite and not negative"),
        (probe({"measured": MEASURED | {"overhead_s": None}}), "got a damaged one: `overhead_s` must be a number"),
        (probe({"nominal_speed": 1.0, "name": "a\nb"}), "`name`, `host` and `device` must be printable"),
        ('{"a": 1}', "must contain the output of `lightning-hetero probe --measure --json`, got other JSON."),
        ('{"lightning_hetero_probe": 2}', "must be of version 1, got 2. Run the probe again."),
        ('{"lightning_hetero_probe": 1}', "got a damaged one: `host` must be present"),
        ("{", "got a file that is not JSON."),
    ],
)  # fmt: skip
def test_a_wrong_probe_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "node.json").write_text(content)
    assert message in mistake(tmp_path, "global_batch_size: 9\ndevices:\n  - {probe: node.json}\n", capsys)


def test_a_probe_has_names_and_times_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = "global_batch_size: 9\ndevices:\n  - "
    assert "node.json must be a file, but it does not exist" in mistake(tmp_path, head + "{probe: node.json}", capsys)
    assert "`devices[0].name` must be left out" in mistake(tmp_path, head + "{probe: node.json, name: A}", capsys)


def test_a_table_fits_eighty_columns_and_interprets_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "global_batch_size: 1_000_000_00\nparameters: 1e9\nlink_gigabits_per_s: 1\ndevices:\n"
        "  - {name: '[red]a device with a very long name :smile: [/nothing]', count: 99999, samples_per_s: 0.0013,"
        " price_per_hour: 3}\n  - {name: useless, count: 7, samples_per_s: 0.0001, overhead_ms: 1e12,"
        " price_per_hour: 1}\n"
    )
    printed = plan(tmp_path, text, capsys)
    assert max(map(len, printed.splitlines())) <= 80
    assert "[red]a device" in printed
    assert ":smile:" in printed
    assert re.search(r"leave out\s+all 7 useless", printed)
    assert "plain ddp, with equal shares" in printed
    assert "the all-reduce adds" in printed
    assert "a million samples cost" in printed


def test_a_pipeline_is_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PIPELINE.replace("milliseconds: 3", "milliseconds: 16") + SPEEDS + "num_microbatches: 8\n"
    found = document(tmp_path, text, capsys)
    assert [(one["rank"], one["num_layers"]) for one in found["stages"]] == [(1, 4), (0, 8)]
    assert found["alone"] == {"rank": 0, "step_time": pytest.approx(0.768), "fits": None}
    assert found["speed_up"] > 1.3
    assert found["is_refined"] is True
    printed = plan(tmp_path, text, capsys)
    assert max(map(len, printed.splitlines())) <= 80
    assert "with equal numbers of layers" in printed


def test_a_long_pipeline_says_how_it_was_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = PIPELINE.replace("12", "64") + "  - {name: A, speed: 1, count: 16}\nnum_microbatches: 32\n"
    assert document(tmp_path, text, capsys)["is_refined"] is False
    assert "only the slowest stage was minimised" in " ".join(plan(tmp_path, text, capsys).split())


def test_a_note_reports_equal_stages_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    devices = "  - {name: A, speed: 1, memory_gigabytes: 5}\n  - {name: B, speed: 1, memory_gigabytes: 2}\n"
    printed = plan(tmp_path, PIPELINE + devices + "layer_parameter_megabytes: 100\n", capsys)
    assert "but these stages do not fit into memory" in re.sub(r"\s+", " ", printed)
    assert "but the model does not fit" in re.sub(r"\s+", " ", printed)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [([str(EXAMPLES / "cluster.yaml")], 0, "speed-up"), (["no.yaml"], 2, "no.yaml must be a file")],
)
def test_the_real_command(arguments: list[str], status: int, expected: str) -> None:
    """Run it in its own process, without a terminal, where an import of torch or Lightning fails."""
    program = (
        "import sys; sys.modules['torch'] = sys.modules['lightning'] = None; sys.argv[0] = 'lightning-hetero';"
        "from lightning_hetero.command.main import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "plan", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert expected in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
