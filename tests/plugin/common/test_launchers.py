"""The registered names start real processes, as a user's script does; an error ends them all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader
from training import Numbered, SmallModule, flat
from lightning_hetero import HeteroDDPStrategy

class NeverFits(SmallModule):
    # runs out of memory on one rank, with a single sample too, in the backward pass of the fourth step
    rank = -1

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.rank == self.global_rank and self.trainer.fit_loop.total_batch_idx == 3:
            loss.register_hook(self.run_out)
        return loss

    def run_out(self, gradient):
        raise torch.OutOfMemoryError("out of memory, as a test wants it")

def main(strategy):
    seed_everything(7, verbose=False)
    module = NeverFits()
    NeverFits.rank = int(sys.argv[2]) if len(sys.argv) > 2 else -1
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_steps=12, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      limit_val_batches=0)
    trainer.fit(module, DataLoader(Numbered(46), batch_size=4, shuffle=True))
    if trainer.is_global_zero:
        print("parameters", flat(module.network))

if __name__ == "__main__":
    main(eval(sys.argv[1]))
"""


def run_script(folder: Path, *arguments: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Run the script as a user would and return what it printed."""
    script = folder / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        cwd=folder,
        check=False,
    )


@pytest.mark.parametrize("name", ["hetero_ddp", "hetero_ddp_spawn", "hetero_ddp_fork_find_unused_parameters_true"])
def test_a_name_starts_ranks_that_train(tmp_path: Path, name: str) -> None:
    from training import reference_parameters

    done = run_script(tmp_path, repr(name))
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("parameters ")]
    found = [float(number) for number in line.removeprefix("parameters [").removesuffix("]").split(",")]
    expected = reference_parameters(46, 8, 12)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-10


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            'HeteroDDPStrategy(shares={"Tesla K80": 1})',
            "`shares` must name the device of every rank, got ['Tesla K80']",
        ),
        ("HeteroDDPStrategy(shares=[1, 2, 3])", "`shares` must have one number per rank (2), got 3"),
        ("HeteroDDPStrategy(max_batch_size=3)", "`max_batch_size` must together hold the global batch of 8 samples"),
    ],
)
def test_bad_input_ends_the_script_with_one_clear_error(tmp_path: Path, strategy: str, message: str) -> None:
    """A device name and a loader's batch size are known only to the ranks; all of them raise, none is left waiting."""
    done = run_script(tmp_path, strategy)
    assert done.returncode != 0
    assert message in done.stderr
    assert "parameters" not in done.stdout


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_for_which_nothing_fits_ends_all_and_is_named(tmp_path: Path, rank: int) -> None:
    """The peers wait in an all-reduce; they end in seconds, and the one that can still be reached says why too."""
    done = run_script(tmp_path, "HeteroDDPStrategy()", str(rank), timeout_s=120)
    assert done.returncode != 0
    assert f"RankOutOfMemoryError: Rank {rank} (cpu) ran out of memory in the backward pass of training" in done.stderr
    assert "a single sample does not fit" in done.stderr
    if rank == 1:
        assert f"RankFailedError: Another rank has failed: Rank {rank}" in done.stderr
    assert "parameters" not in done.stdout


PIPELINE = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
from torch import nn
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from lightning_hetero import HeteroPipelineStrategy

class Fails(nn.Module):
    def forward(self, x):
        if self.training and sys.argv[2] == "layer":
            raise KeyError("of a layer")
        return x

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
        if sys.argv[2] == "layer":
            self.model[int(sys.argv[3])] = Fails()
        self.before = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        (x,) = batch
        step = sys.argv[2]
        if step == "trained before":
            x = self.before(x)
        if step == "never":
            return x.sum()
        y = self.model(input=x) if step == "keywords" else self.model(x)
        if step == "twice":
            self.model(x)
        if step == "loss":
            raise KeyError("of a loss")
        return y.square().mean()

    def on_train_end(self):
        if self.global_rank == 0:
            print("trained", self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

class Saves(Callback):
    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint("failed.ckpt")

class Data(TensorDataset):
    def __getitem__(self, index):
        if sys.argv[2] == "data" and index > 30:
            raise KeyError("of a sample")
        return super().__getitem__(index)

if __name__ == "__main__":
    torch.manual_seed(1)
    trainer = Trainer(accelerator="cpu", devices=3, strategy=eval(sys.argv[1]), max_steps=12, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                      callbacks=[Saves()] if "callback saves" in sys.argv else [])
    try:
        trainer.fit(Module(), DataLoader(Data(torch.randn(48, 2)), batch_size=4))
    except KeyError:
        if "saves" in sys.argv:
            trainer.save_checkpoint("failed.ckpt")
        raise
    trainer.save_checkpoint("after.ckpt")
"""


def running_in_group(group: int) -> list[int]:
    """Return the processes of a group that have not ended; those that have may still be listed."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, its_group = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                found.append(int(stat.parent.name))
    return found


def run_pipeline(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a pipeline of three stages in its own session, and find out what it leaves."""
    script = folder / "pipeline.py"
    script.write_text(PIPELINE, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=folder, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=120)
        deadline = time.monotonic() + 10
        while left := running_in_group(process.pid):
            assert time.monotonic() < deadline, f"processes are left: {left}"
            time.sleep(0.2)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


@pytest.mark.parametrize("name", ["hetero_pipeline", "hetero_pipeline_spawn"])
def test_a_name_starts_a_pipeline(tmp_path: Path, name: str) -> None:
    done = run_pipeline(tmp_path, repr(name), "well")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["trained", "12"]
    assert "hetero_pipeline: [1, 1, 1] layers per rank" in done.stderr
    assert "predicted" in done.stderr
    saved = torch.load(tmp_path / "after.ckpt", weights_only=True)
    assert saved["global_step"] == (12 if name == "hetero_pipeline" else 0)  # the spawning process makes no steps
    assert {tuple(value.shape) for value in saved["state_dict"].values()} == {(2, 2), (2,)}  # of all stages
    assert len(saved["state_dict"]) == 8


SPLIT = "HeteroPipelineStrategy(splits=[1, 2], num_microbatches=2{})"


@pytest.mark.parametrize(
    ("start_method", "what", "error"),
    [
        ("", ("layer", "0"), "KeyError: 'of a layer'"),
        ("", ("layer", "1"), "KeyError: 'of a layer'"),
        (', start_method="spawn"', ("layer", "0"), "KeyError: 'of a layer'"),
        (', start_method="spawn"', ("layer", "2"), "KeyError: 'of a layer'"),
        ("", ("loss",), "KeyError: 'of a loss'"),
        ("", ("data",), "KeyError: 'of a sample'"),
        ("", ("data", "saves"), "RankFailedError: `hetero_pipeline` cannot save after a run has failed"),
        ("", ("data", "callback saves"), "`hetero_pipeline` cannot save after a run has failed"),
        ("", ("layer", "0", "callback saves"), "`hetero_pipeline` cannot save after a run has failed"),
        ("", ("twice",), "to call the model exactly once, got a second call"),
        ("", ("never",), "to call the model exactly once, got no call"),
        ("", ("keywords",), "positional arguments, got ['input']"),
        ("", ("trained before",), "that are used before the model is called to be in its layers"),
    ],
)
def test_an_error_on_any_stage_ends_all_and_is_told(
    tmp_path: Path, start_method: str, what: tuple[str, ...], error: str
) -> None:
    done = run_pipeline(tmp_path, SPLIT.format(start_method), *what)
    assert done.returncode != 0
    assert error in done.stderr
    if "callback saves" in what:
        assert "KeyError: 'of a " in done.stderr
        assert "RankFailedError: `hetero" not in done.stderr
    assert "trained" not in done.stdout
    assert not list(tmp_path.glob("*.ckpt"))
