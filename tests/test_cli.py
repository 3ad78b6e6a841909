"""Every public class from flags and YAML: what it is given, how it is explained, and what becomes of mistakes."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import Strategy

import lightning_hetero
from lightning_hetero import testing
from lightning_hetero.cli import HeteroCLI
from lightning_hetero.exceptions import RankFailedError

QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
         "--trainer.accelerator=cpu", "--trainer.devices=2"]  # fmt: skip

# each class with arguments as flags give them, and what its attributes then are
GIVEN: dict[str, dict[str, tuple[str, Any]]] = {
    "HeteroDDPStrategy": {
        "shares": ("[1,2]", [1.0, 2.0]),
        "global_batch_size": ("64", 64),
        "max_batch_size": ('{"Tesla K80": 24, "a:b": 96}', {"Tesla K80": 24, "a:b": 96}),
        "micro_batch_size": ("[8,16]", [8, 16]),
        "batch_multiple": ("8", 8),
        "num_loss_terms": ("builtins.len", len),
    },
    "HeteroFSDPStrategy": {
        "shard_weights": ("[2,1]", [2.0, 1.0]),
        "units": ("[torch.nn.Linear]", [torch.nn.Linear]),
        "activation_bytes": ("1e6", 1e6),
        "reshard_after_forward": ("false", False),
        "shares": ("[1,3]", [1.0, 3.0]),
    },
    "HeteroPipelineStrategy": {
        "splits": ("[4]", [4]),
        "num_microbatches": ("8", 8),
        "schedule": ("gpipe", "gpipe"),
        "loss_reduction": ("sum", "sum"),
        "max_memory_bytes": ("[1000,2000]", [1000, 2000]),
        "verbose": ("false", False),
    },
    "LoadBalancer": {
        "warmup_steps": ("0", 0),
        "tune_steps": ("5", 5),
        "min_gain": ("0.02", 0.02),
        "watch_steps": ("0", 0),
        "memory_fraction": ("0.5", 0.5),
    },
    "LargestBatchFinder": {"verbose": ("false", False)},
    "PipelineRecorder": {"step": ("3", 3)},
    "SlowDown": {"factors": ("[1,2]", [1.0, 2.0])},
    "SlowLayers": {"factors": ("[1,2]", [1.0, 2.0]), "seconds_per_sample": ("[0.1,0.2]", [0.1, 0.2])},
}
CLASSES: dict[str, type[Any]] = {
    name: getattr(module, name)
    for module in (lightning_hetero, testing)
    for name in module.__all__
    if inspect.isclass(getattr(module, name))
}


@pytest.fixture(autouse=True)
def _command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py"])


def flags(name: str, **values: str) -> list[str]:
    """Return the flags that configure a class by its short name."""
    is_strategy = issubclass(CLASSES[name], Strategy)
    key, plus = ("trainer.strategy", "") if is_strategy else ("trainer.callbacks", "+")
    return [f"--{key}{plus}={name}", *(f"--{key}.{argument}={value}" for argument, value in values.items())]


def construct(*arguments: str, cli: type[LightningCLI] = LightningCLI) -> Trainer:
    """Return the Trainer that a command line without subcommand makes."""
    made = cli(
        BoringModel, run=False, save_config_callback=None, seed_everything_default=False, args=[*QUIET, *arguments]
    )
    return made.trainer


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """Return what a command line prints that ends the process with ``status``."""
    with pytest.raises(SystemExit) as ended:
        construct(*arguments, cli=HeteroCLI)
    assert ended.value.code == status
    captured = capsys.readouterr()
    return captured.err if status else captured.out


def part(trainer: Trainer, name: str) -> Strategy | Callback:
    """Return the strategy or the callback of that class."""
    (found,) = (p for p in (trainer.strategy, *trainer.callbacks) if type(p).__name__ == name)  # type: ignore[attr-defined]
    return found  # type: ignore[no-any-return]


def test_every_public_class_is_tried() -> None:
    assert CLASSES.keys() == GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_flags_and_the_configuration_that_they_print_make_the_same(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    values = flags(name, **{argument: flag for argument, (flag, _) in GIVEN[name].items()})
    config = printed(capsys, *values, "--print_config")
    (tmp_path / "config.yaml").write_text(config)
    from_file = ["--config", str(tmp_path / "config.yaml")]
    assert printed(capsys, *from_file, "--print_config") == config
    for arguments in (values, from_file):
        made = part(construct(*arguments), name)
        assert {argument: getattr(made, argument) for argument in GIVEN[name]} == {
            argument: expected for argument, (_, expected) in GIVEN[name].items()
        }


@pytest.mark.parametrize("name", GIVEN)
def test_the_help_explains_every_argument(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")  # nothing is wrapped
    key = "strategy" if issubclass(CLASSES[name], Strategy) else "callbacks"
    text = printed(capsys, f"--trainer.{key}.help={name}")
    documented = {p.arg_name: p.description for p in docstring_parser.parse(CLASSES[name].__doc__ or "").params}
    arguments = [p for p in inspect.signature(CLASSES[name]).parameters.values() if p.kind != p.VAR_KEYWORD]
    for argument in arguments:
        (explained,) = re.findall(rf"^  --trainer\.{key}\.{argument.name}[ ,].*\n\s+(.*)", text, re.MULTILINE)
        what, _, kind = explained.partition(" (")
        assert what
        assert explained.startswith(" ".join((documented[argument.name] or "").split()))
        assert "type: " in explained
        assert "Untyped" not in kind
        assert "Any" not in explained.rpartition("type: ")[2].replace("Callable[[Any], float]", "")


@pytest.mark.parametrize(
    ("name", "argument", "value", "message"),
    [
        # the parser's own
        ("HeteroDDPStrategy", "share", "[1,2]", "Option 'share' is not accepted"),
        ("HeteroDDPStrategy", "shares", "fast", '"shares":'),
        ("HeteroDDPStrategy", "loss_reduction", "max", '"loss_reduction":'),
        ("HeteroDDPStrategy", "num_loss_terms", "nowhere.count", '"num_loss_terms":'),
        ("HeteroPipelineStrategy", "find_unused_parameters", "true", "'find_unused_parameters' is not accepted"),
        ("HeteroPipelineStrategy", "schedule", "zigzag", '"schedule":'),
        ("LoadBalancer", "tunesteps", "5", "Option 'tunesteps' is not accepted"),
        ("LoadBalancer", "tune_steps", "soon", '"tune_steps":'),
        # ours, at construction
        ("HeteroDDPStrategy", "shares", "[1,-2]", "`shares[1]` must be a finite positive number, got -2.0"),
        ("HeteroDDPStrategy", "batch_multiple", "0", "`batch_multiple` must be an integer of at least 1, got 0"),
        ("HeteroPipelineStrategy", "splits", "[3,2]", "`splits` must be positive and strictly increasing, got [3, 2]"),
        ("LoadBalancer", "tune_steps", "0", "`tune_steps` must be an integer of at least 1, got 0"),
        ("PipelineRecorder", "step", "-1", "`step` must be an integer of at least 0, got -1"),
        ("SlowDown", "factors", "[0.5,1]", "`factors[0]` must be a finite number of at least 1, got 0.5"),
        # ours, where the number of ranks is known
        ("HeteroDDPStrategy", "shares", "[1,2,3]", "`shares` must have one number per rank (2), got 3"),
        ("HeteroPipelineStrategy", "speeds", "[1]", "`speeds` must have one number per rank (2), got 1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("from_file", [False, True], ids=["flags", "yaml"])
def test_a_mistake_ends_in_a_message_that_names_it(
    name: str, argument: str, value: str, message: str, from_file: bool,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    wrong = flags(name, **{argument: value})
    if from_file:
        is_strategy, path = issubclass(CLASSES[name], Strategy), tmp_path / "config.yaml"
        path.write_text(
            f"trainer:\n  {'strategy' if is_strategy else 'callbacks'}:\n   {' ' if is_strategy else '-'}"
            f" class_path: {CLASSES[name].__module__}.{name}\n     init_args:\n       {argument}: {value}\n"
        )
        wrong = ["--config", str(path)]
    last = printed(capsys, *wrong, status=2)
    assert message in last[last.index("error: ") :]
    if "Parser key" not in last:
        assert last.startswith("train.py: error: `")


@pytest.mark.parametrize(
    "arguments",
    [flags("HeteroDDPStrategy", shares="[1,-2]"), flags("LoadBalancer", tune_steps="0")],
    ids=["strategy", "callback"],
)
def test_lightnings_own_cli_tells_as_well(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match=r"`shares\[1\]` must be|`tune_steps` must be"):
        construct(*arguments)


class Failing(BoringModel):
    def __init__(self) -> None:
        raise RankFailedError("of the model")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RankFailedError, match="of the model"):
        HeteroCLI(Failing, run=False, seed_everything_default=False, args=QUIET)
