"""The prediction of all strategies: each as it is predicted by itself, and the simplest of the fastest is taken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_hetero.command.main import main
from lightning_hetero.command.plan.auto.choice import AutoCluster, AutoDevice, predict_all
from lightning_hetero.command.plan.auto.model import Model, ModelLayer
from lightning_hetero.command.plan.auto.model_file import model_document

EXAMPLES = Path(__file__).parents[3] / "examples"
GB = 1e9
BLOCK = ModelLayer(0.001, 0.002, parameter_bytes=4e6, activation_bytes=1e6, output_bytes=1e5)


def cluster(*devices: tuple[int, float, float | None], block: ModelLayer = BLOCK, **changes: Any) -> AutoCluster:
    kinds = tuple(AutoDevice(f"kind {i}", *device) for i, device in enumerate(devices))
    return AutoCluster(kinds, Model((block,) * 12), 96, **changes)


def steps(found: AutoCluster) -> dict[str, float | None]:
    return {one.strategy: one.step_s for one in predict_all(found).candidates}


def chosen(found: AutoCluster) -> str | None:
    one = predict_all(found).chosen
    return None if one is None else one.strategy


def test_equal_devices_need_nothing_new() -> None:
    assert chosen(cluster((4, 1.0, 24 * GB))) == "ddp"


def test_unequal_devices_share_by_speed() -> None:
    found = cluster((1, 2.0, 24 * GB), (1, 1.0, 24 * GB))
    assert chosen(found) == "hetero_ddp"
    of = steps(found)
    assert of["hetero_ddp"] == pytest.approx(64 * 12 * 0.003 / 2)
    assert of["ddp"] == pytest.approx(48 * 12 * 0.003)


def test_a_model_that_is_too_large_for_one_is_divided() -> None:
    large = ModelLayer(0.001, 0.002, parameter_bytes=0.5 * GB, activation_bytes=1e6, output_bytes=1e5)
    devices = ((1, 2.0, 16 * GB), (1, 1.0, 24 * GB))
    fast_link = cluster(*devices, block=large, bits_per_s=8e11)
    assert chosen(fast_link) == "hetero_fsdp"
    slow_link = cluster(*devices, block=large, bits_per_s=1e10)
    assert chosen(slow_link) == "hetero_pipeline", "activations are smaller than parameters"
    reasons = {one.strategy: one.why_not for one in predict_all(slow_link).candidates}
    assert reasons["hetero_ddp"] is not None
    assert "every device holds the whole model, for which kind 0 would need 24 GB" in reasons["hetero_ddp"]
    assert reasons["ddp"] is not None
    assert "kind 0 would need 24.6 GB for 48 samples, and may use 14.7 GB" in reasons["ddp"]


def test_replicas_of_unequal_pipelines_are_named_where_they_are_fastest() -> None:
    large = ModelLayer(0.001, 0.002, parameter_bytes=0.4 * GB, activation_bytes=1e6, output_bytes=1e5)
    devices = ((2, 2.0, 16 * GB), (2, 1.0, 16 * GB))
    found = predict_all(cluster(*devices, block=large, bits_per_s=1e12))
    replicas = found.candidates[-1]
    assert replicas.argument == "HeteroPipelineStrategy(replicas=[[0, 1], [2, 3]], num_microbatches=8)"
    # 64 samples in one pipeline and 32 in the other, half of the layers on each device, and then an average of 2.4 GB
    passes_s = 9 / 8 * 64 * 6 * 0.003 / 2 + 2 * (8 * 8 * 1e5 / 1e12)
    assert replicas.step_s == pytest.approx(passes_s + 8 * 2.4 * GB / 1e12, rel=1e-3)
    assert (replicas.step_s or 0.0) < 0.91 * (
        steps(cluster(*devices, block=large, bits_per_s=1e12))["hetero_pipeline"] or 0.0
    )
    assert replicas.needed_bytes is not None
    assert all(6 * 5 * 0.4 * GB < needed < 0.92 * 16 * GB for needed in replicas.needed_bytes)


def test_replicas_average_layers_within_nodes() -> None:
    large = ModelLayer(0.001, 0.002, parameter_bytes=0.4 * GB, activation_bytes=1e6, output_bytes=1e5)
    one_node = cluster((4, 1.0, 16 * GB), block=large, bits_per_s=1e10)
    nodes = cluster((4, 1.0, 16 * GB), block=large, bits_per_s=1e10, devices_per_node=2, node_bits_per_s=1e12)
    replicas = predict_all(nodes).candidates[-1]
    assert replicas.argument == "HeteroPipelineStrategy(replicas=[[0, 2], [1, 3]], num_microbatches=8)"
    assert (replicas.step_s or 0.0) < (steps(one_node).get("replicas") or float("inf"))


def test_where_nothing_fits_nothing_is_taken() -> None:
    large = ModelLayer(0.001, 0.002, parameter_bytes=10 * GB)
    found = predict_all(cluster((2, 1.0, 16 * GB), block=large))
    assert found.chosen is None
    assert all(one.why_not for one in found.candidates)


def test_fewer_layers_than_devices_leave_other_strategies() -> None:
    """Several short pipelines among them."""
    half = ModelLayer(0.001, 0.002, parameter_bytes=2 * GB, activation_bytes=1e6, output_bytes=1e5)
    few = replace(cluster((4, 1.0, 16 * GB), block=half, bits_per_s=1e12), model=Model((half,) * 2))
    found = {one.strategy: one for one in predict_all(few).candidates}
    assert "at least one layer per device, got 4 devices and 2 layers" in (found["hetero_pipeline"].why_not or "")
    assert found["replicas"].argument == "HeteroPipelineStrategy(replicas=[[0, 1], [2, 3]], num_microbatches=8)"
    small = replace(few, model=Model((BLOCK,) * 2))
    assert predict_all(small).chosen is not None


def test_that_nothing_fits_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [{"forward_ms": 1, "backward_ms": 2, "parameter_megabytes": 1e5}]
    code, out, _ = run(tmp_path, capsys, layers=layers)
    assert code == 0
    assert "none of them can train this: use more or larger devices, a smaller batch, or a smaller model" in out


def test_a_batch_must_have_a_sample_per_device() -> None:
    found = predict_all(replace(cluster((1, 2.0, 24 * GB), (2, 1.0, 24 * GB)), global_batch_size=2))
    reasons = {one.strategy: one.why_not for one in found.candidates}
    assert "at least" in (reasons["hetero_ddp"] or "")


def test_large_mini_batches_are_cut() -> None:
    block = ModelLayer(0.001, 0.002, 0.001, 0.002, parameter_bytes=4e6, activation_bytes=GB)
    found = predict_all(cluster((1, 1.0, 200 * GB), (1, 1.0, 100 * GB), block=block))
    (one,) = (one for one in found.candidates if one.strategy == "hetero_ddp")
    assert one.argument == "HeteroDDPStrategy(micro_batch_size=7)"
    assert one.step_s == pytest.approx(48 * 12 * 0.003 * (1 + 1 / 7)), "each micro-batch has the overhead of a step"


def test_one_device_has_one_strategy() -> None:
    found = predict_all(cluster((1, 1.0, 24 * GB)))
    assert found.chosen is not None
    assert found.chosen.strategy == "ddp"
    assert {one.strategy for one in found.candidates if one.why_not} == {"hetero_fsdp", "hetero_pipeline"}


def test_unknown_memory_limits_nothing_and_makes_no_shards() -> None:
    found = predict_all(cluster((1, 2.0, None), (1, 1.0, None)))
    assert [one.needed_bytes for one in found.candidates if one.step_s is not None] == [None] * 3
    assert {one.strategy for one in found.candidates if one.why_not} == {"hetero_fsdp"}


FILE: dict[str, Any] = {
    "strategy": "auto",
    "global_batch_size": 96,
    "link_gigabits_per_s": 100,
    "layers": [{"forward_ms": 1, "backward_ms": 2, "count": 12, "parameter_megabytes": 4, "output_megabytes": 0.1}],
    "devices": [
        {"name": "fast", "speed": 2, "memory_gigabytes": 16, "price_per_hour": 2},
        {"name": "slow", "speed": 1, "count": 2, "memory_gigabytes": 16, "price_per_hour": 0.5},
    ],
}


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str, **changes: Any) -> tuple[int, str, str]:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**FILE, **changes}.items() if v is not None}), encoding="utf-8")
    code = main(["plan", str(path), *options])
    printed = capsys.readouterr()
    return code, " ".join(printed.out.split()), printed.err


def test_the_table_names_the_line_and_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(tmp_path, capsys)
    assert code == 0
    assert "hetero_ddp *" in out
    assert 'take Trainer(strategy="hetero_ddp", devices=3)' in out
    assert "cost per million" in out
    _, out, _ = run(tmp_path, capsys, devices=[{"name": "one", "speed": 1}], link_gigabits_per_s=None)
    assert "memory is ignored" in out
    assert "hetero_pipeline cannot train this: there is only one device" in out


def test_the_file_of_a_profile_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = ModelLayer(0.001, 0.002, parameter_bytes=4e6, output_bytes=1e5)
    document = model_document(Model((layer,) * 12), module="net:Net")
    (tmp_path / "model.json").write_text(json.dumps(document), encoding="utf-8")
    by_hand = json.loads(run(tmp_path, capsys, "--json")[1])
    profiled = json.loads(run(tmp_path, capsys, "--json", layers=None, model="model.json")[1])
    assert by_hand == profiled
    assert by_hand["chosen"] == "hetero_ddp"
    costs = {one["strategy"]: one["cost_per_million_samples"] for one in by_hand["candidates"]}
    step = next(one["step_time"] for one in by_hand["candidates"] if one["strategy"] == "hetero_ddp")
    assert costs["hetero_ddp"] == pytest.approx(3 / 3600 * step / 96 * 1e6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": None}, "must say what the model takes with exactly one of model, layers"),
        ({"model": "model.json", "layers": None}, "must be a file, but it does not exist"),
        ({"model": "other.yaml", "layers": None}, "must be what `lightning-hetero profile --json` writes"),
        (
            {"model": "model.json", "layers": None, "optimizer_states": 1},
            "`optimizer_states` must be left out with `mo",
        ),
        ({"model": "no_time.json", "layers": None}, "`layers` must take some time per sample, got none"),
        ({"layers": [{"forward_ms": 1, "backward_ms": 1, "count": 4096}] * 2}, "at most 4096 in total, got 8192"),
        ({"samples_per_s": 3}, "`samples_per_s` is not a known key"),
        ({"parameters": 3}, "`parameters` must be left out with `strategy: auto`"),
        ({"num_microbatches": 97}, "`num_microbatches` must be a whole number of at least 1 and at most 96, got 97"),
        ({"node_gigabits_per_s": 200}, "`node_gigabits_per_s` must be given together with `devices_per_node`"),
        ({"layers": [{"forward_ms": 1}]}, "`layers[0].backward_ms` must be a number above 0, it is missing"),
        (
            {"devices": [{"name": "a", "speed": 1, "price_per_hour": 1}, {"name": "b", "speed": 1}]},
            "`price_per_hour` must be given for all devices or for none",
        ),
    ],
)
def test_what_is_wrong_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.yaml").write_text("a: 1", encoding="utf-8")
    no_time = model_document(Model((ModelLayer(0.0, 0.0, 0.001, 0.001),)), module="net:Net")
    (tmp_path / "no_time.json").write_text(json.dumps(no_time), encoding="utf-8")
    code, _, error = run(tmp_path, capsys, **changes)
    assert code == 2
    assert message in error


def test_the_example_of_a_rack(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "rack_cluster.yaml")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "HeteroPipelineStrategy(replicas=[[0, 4], [1, 5], [2, 6], [3, 7]], num_microbatches=8), devices=8)" in out


def test_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(EXAMPLES / "auto_cluster.yaml")]) == 0
    assert "take Trainer(strategy=HeteroPipelineStrategy(num_microbatches=8), devices=3)" in capsys.readouterr().out
