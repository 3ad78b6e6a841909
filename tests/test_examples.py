"""The examples run as a user would run them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from profiles import thorough
from scripts import run_script

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(*arguments: str, name: str = "digits", status: int = 0) -> str:
    """Run an example and return what it printed."""
    done = run_script(EXAMPLES / f"{name}.py", *arguments, COLUMNS="120")
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_the_comparison_finds_the_same_training() -> None:
    """The speed is the benchmark's business; here that both train alike and that the report is there."""
    printed = run_example("--epochs", "4", "--seconds-per-sample", "0.0005")
    (accuracies,) = re.findall(r"accuracy\s*│\s*([\d.]+)\s*│\s*([\d.]+)", printed)
    assert accuracies[0] == accuracies[1]
    (difference,) = re.findall(r"largest difference of a parameter ([\d.e+-]+)", printed)
    assert float(difference) < 1e-5
    assert re.search(r"ratio \d\.\d\d of at most 1\.50", printed)
    assert "speed-up" in printed


CONFIG = ["--config", str(EXAMPLES / "digits.yaml")]


@pytest.mark.parametrize(
    "arguments",
    [
        ["fit", "--trainer.max_epochs=1", "--trainer.strategy.shares=[2,1]", "--trainer.strategy.batch_multiple=8"],
        ["fit", "--trainer.max_epochs=1", "--trainer.strategy=hetero_ddp", "--trainer.callbacks=null",
         "--trainer.callbacks+=LoadBalancer", "--trainer.callbacks.tune_steps=5",
         "--trainer.callbacks+=LargestBatchFinder", "--trainer.callbacks.verbose=false"],
        ["validate", "--trainer.strategy=hetero_ddp_fork"],
        ["test", "--trainer.strategy=hetero_ddp_fork"],
        ["predict", "--trainer.strategy=hetero_ddp_fork"],
        pytest.param(["test", "--trainer.strategy=hetero_ddp_spawn"], marks=thorough),
        pytest.param(["validate"], marks=thorough),
        pytest.param(["predict"], marks=thorough),
    ],
    ids=["flags", "names", "validate", "test", "predict", "spawned test", "configured validate", "configured predict"],
)  # fmt: skip
def test_the_digits_run_as_a_lightning_cli(arguments: list[str]) -> None:
    subcommand, *rest = arguments
    printed = run_example(subcommand, *CONFIG, *rest)
    assert "error" not in printed.lower(), printed
    assert ("accuracy" in printed) == (subcommand in {"fit", "validate", "test"})


def test_the_configuration_that_is_printed_runs(tmp_path: Path) -> None:
    config = run_example("fit", *CONFIG, "--trainer.max_epochs=4", "--print_config")
    (tmp_path / "printed.yaml").write_text(config[config.index("seed_everything:") :])
    assert "speed-up " in run_example("fit", "--config", str(tmp_path / "printed.yaml"))


def test_a_mistake_that_all_ranks_find_ends_them_without_traceback() -> None:
    printed = run_example("fit", *CONFIG, "--trainer.strategy=ddp", status=2)
    assert "digits.py: error: `LoadBalancer` needs a strategy that can divide batches unequally" in printed
    assert "Traceback" not in printed


def test_equal_stages_and_those_found_train_alike() -> None:
    """On twelve layers; the ratio of two to one is only roughly met where little time is taken for each layer."""
    printed = run_example("--steps", "5", "--seconds-per-sample", "0.001", name="characters")
    (equal, found) = re.findall(r"layers per rank\s*│\s*(\d+, \d+)\s*│\s*(\d+, \d+)", printed)[0]
    assert equal == "6, 6"
    fast, slow = map(int, found.split(", "))
    assert fast >= slow
    assert fast + slow in (12, 13, 14), "at each border of a V, both ranks may have the layer"
    (difference,) = re.findall(r"largest difference of a parameter ([\d.e+-]+)", printed)
    assert float(difference) < 1e-4, "AdamW scales up what other orders of additions round"
    assert "hetero_pipeline: predicted" in printed


@pytest.mark.parametrize(
    "arguments",
    [["fit", "--trainer.max_steps=2", "--trainer.strategy.start_method=fork"],
     pytest.param(["fit", "--trainer.max_steps=2", "--trainer.strategy=hetero_pipeline"], marks=thorough),
     *(pytest.param([command], marks=thorough) for command in ("validate", "test", "predict")),
     *([command, "--trainer.strategy.start_method=fork"] for command in ("validate", "test", "predict"))],
    ids=["forked fit", "name", "validate", "test", "predict", "forked validate", "forked test", "forked predict"],
)  # fmt: skip
def test_a_pipeline_runs_from_yaml(arguments: list[str]) -> None:
    subcommand, *rest = arguments
    config = ["--config", str(EXAMPLES / "characters.yaml"), "--trainer.limit_val_batches=1"]
    printed = run_example(
        subcommand, *config, "--trainer.limit_test_batches=1", "--trainer.limit_predict_batches=1", *rest,
        name="characters",
    )  # fmt: skip
    assert "layers per rank" in printed
    assert "error" not in printed.lower(), printed
    assert "terminate called" not in printed


@pytest.mark.parametrize("subcommand", ["fit", pytest.param("validate", marks=thorough)])
def test_shards_run_from_yaml(subcommand: str) -> None:
    config = ["--config", str(EXAMPLES / "characters_shards.yaml"), "--trainer.limit_val_batches=1"]
    steps = ["--trainer.max_steps=2", "--trainer.strategy.start_method=fork"] if subcommand == "fit" else []
    printed = run_example(subcommand, *config, *steps, name="characters")
    assert "error" not in printed.lower(), printed


def test_replicas_run_from_yaml() -> None:
    config = ["--config", str(EXAMPLES / "characters_replicas.yaml"), "--trainer.limit_val_batches=1"]
    steps = ["--trainer.max_steps=2", "--trainer.strategy.start_method=fork"]
    printed = run_example("fit", *config, *steps, name="characters")
    assert printed.count("hetero_pipeline: replica") == 2
    assert "error" not in printed.lower(), printed
