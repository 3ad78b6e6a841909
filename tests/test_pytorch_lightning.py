"""`pytorch_lightning`, the other package in which Lightning is published: all ways to use a strategy work there too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any

import pytest
from harness import WITHOUT_LIGHTNING
from profiles import THOROUGH, thorough
from scripts import run_script
from training import assert_close

PROGRAMS = Path(__file__).parent / "programs"
OTHER_FIRST, OURS_FIRST = (
    "import pytorch_lightning; import lightning_hetero",
    "import lightning_hetero; import pytorch_lightning",
)
BOTH = "import lightning.pytorch; import lightning_hetero; import pytorch_lightning"
BY_OBJECT = "HeteroDDPStrategy(shares=[1, 3], start_method='fork')"
BALANCED = "HeteroDDPStrategy(shares=[1, 3], start_method='fork'), LoadBalancer(warmup_steps=1, tune_steps=3)"
QUIET = "accelerator='cpu', devices=2, logger=False, enable_checkpointing=False, enable_progress_bar=False"


# Where a new interpreter is not what is tested, processes are forked from one that has torch, but not Lightning.
pytestmark = pytest.mark.xdist_group("test_pytorch_lightning.py")
SERVER = ForkServer()
SERVER.set_forkserver_preload(WITHOUT_LIGHTNING)


def run(script: Path, *arguments: str) -> str:
    """Run a script and return what it prints."""
    done = in_new_interpreter(str(script), *arguments) if THOROUGH else run_script(script, *arguments, server=SERVER)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def in_new_interpreter(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            out, err = process.communicate(timeout=150)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def printed_by(code: str) -> str:
    """Return what ``code`` prints."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(f"import warnings; warnings.filterwarnings('ignore')\n{code}", encoding="utf-8")
        return run(script)


def trained(imports: str, package: str, *strategies: str) -> list[Any]:
    printed = run(PROGRAMS / "other_package.py", imports, package, *strategies)
    found = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert len(found) == len(strategies), printed
    return found


STRATEGIES = ["ddp_fork", "hetero_ddp_fork", "one_to_three", BY_OBJECT, BALANCED, "alone", "split_after_one"]
# objects that were made for the other package
CONVERTED = "from lightning_hetero import *; import pytorch_lightning"
CONVERTED_BACK = "import pytorch_lightning; from lightning_hetero import *; import lightning.pytorch"


@pytest.mark.parametrize(
    ("imports", "package"),
    [
        (OTHER_FIRST, "pytorch_lightning"),
        pytest.param(OURS_FIRST, "pytorch_lightning", marks=thorough),
        (CONVERTED, "pytorch_lightning"),
        pytest.param(BOTH, "pytorch_lightning", marks=thorough),
        pytest.param(BOTH, "lightning.pytorch", marks=thorough),
        pytest.param(CONVERTED_BACK, "lightning.pytorch", marks=thorough),
    ],
)
def test_a_training_is_that_of_ddp(imports: str, package: str) -> None:
    ddp, *found, one_device, pipeline = trained(imports, package, *STRATEGIES)
    assert_close(pipeline["parameters"], one_device["parameters"])
    assert ddp["sizes"][0] == ddp["sizes"][1]
    for one in found:
        assert_close(one["parameters"], ddp["parameters"])
    for one in found[1:3]:  # registered, by object
        assert [sizes[:5] for sizes in one["sizes"]] == [[2] * 5, [6] * 5]
    assert [sizes[:1] for sizes in found[3]["sizes"]] == [[2], [6]]


@pytest.mark.parametrize(
    ("imports", "strategy"),
    [
        pytest.param(OURS_FIRST, "hetero_ddp", marks=thorough),
        (OURS_FIRST, "hetero_ddp_spawn"),
        # the object that the processes get has changed its class
        pytest.param(CONVERTED, "HeteroDDPStrategy(start_method='spawn')", marks=thorough),
    ],
)
def test_started_processes_find_the_classes(imports: str, strategy: str) -> None:
    found, ddp = trained(imports, "pytorch_lightning", strategy, "ddp_fork")
    assert_close(found["parameters"], ddp["parameters"])


NAMES = """
from lightning.pytorch.strategies import StrategyRegistry as one
from pytorch_lightning.strategies import StrategyRegistry as other
lightning_hetero.register("mine", shares=[1, 3])
ours = lambda registry: sorted(n for n in registry if n.startswith("hetero_") or n == "mine")
assert ours(one) == ours(other)
for name in ours(one):
    a, b = one[name], other[name]
    assert a["init_params"] == b["init_params"] and a["strategy"] is not b["strategy"]
    for registry, package in ((one, "lightning.pytorch"), (other, "pytorch_lightning")):
        import importlib
        base = importlib.import_module(package).strategies.DDPStrategy
        assert base in registry[name]["strategy"].__mro__
print(len(ours(one)))
"""


@pytest.mark.parametrize(
    "imports",
    [
        BOTH,
        # as a process that unpickles a class
        "from lightning_hetero.pytorch_lightning.ddp.strategy import HeteroDDPStrategy; import lightning_hetero",
        *(
            pytest.param(imports, marks=thorough)
            for imports in (
                OTHER_FIRST,
                "import lightning_hetero; import lightning.pytorch; import pytorch_lightning",
                "import pytorch_lightning; import lightning.pytorch; import lightning_hetero",
                "from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy; import lightning_hetero",
                "import pytorch_lightning; import lightning_hetero.plugin.pipeline.recorder",
            )
        ),
    ],
)
def test_both_registries_have_all_names(imports: str) -> None:
    assert printed_by(f"{imports}\n{NAMES}") == "17"


@pytest.mark.parametrize("imports", [pytest.param(OTHER_FIRST, marks=thorough), OURS_FIRST])
def test_those_who_use_one_package_import_one(imports: str) -> None:
    code = f"""
{imports}
import sys
from lightning_hetero import HeteroDDPStrategy, LoadBalancer
pytorch_lightning.Trainer(strategy=HeteroDDPStrategy(), callbacks=LoadBalancer(), {QUIET})
assert issubclass(HeteroDDPStrategy, pytorch_lightning.strategies.DDPStrategy)
assert issubclass(LoadBalancer, pytorch_lightning.Callback)
print([name for name in sys.modules if name.split(".")[0] == "lightning"])
"""
    assert printed_by(code) == "[]"


def test_this_package_imports_no_lightning_by_itself() -> None:
    done = in_new_interpreter("-c", "import lightning_hetero, sys; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
    code = "import lightning_hetero, sys; import lightning.pytorch; print('pytorch_lightning' in sys.modules)"
    assert printed_by(code) == "False"


def test_objects_become_those_of_their_trainer() -> None:
    code = f"""
{BOTH}
from lightning_hetero import HeteroDDPStrategy, HeteroPipelineStrategy, LoadBalancer, PipelineRecorder
import lightning_hetero.pytorch_lightning as other
for package, cls in ((pytorch_lightning, HeteroDDPStrategy), (lightning.pytorch, other.HeteroDDPStrategy)):
    strategy = cls(shares=[1, 3], find_unused_parameters=True, start_method="spawn")
    strategy.batch_multiple = 2
    assert isinstance(strategy, package.strategies.Strategy)
    trainer = package.Trainer(strategy=strategy, callbacks=LoadBalancer(), {QUIET})
    assert trainer.strategy is strategy and package.strategies.DDPStrategy in type(strategy).__mro__
    assert isinstance(trainer.callbacks[0], package.Callback)
    assert strategy._ddp_kwargs == {{"find_unused_parameters": True}} and strategy._start_method == "spawn"
    assert (strategy.shares, strategy.batch_multiple, strategy.train_data._strategy) == ([1, 3], 2, strategy)
    import pickle
    assert type(pickle.loads(pickle.dumps(strategy))) is type(strategy)
pytorch_lightning.Trainer(strategy=HeteroPipelineStrategy(splits=[2]), callbacks=PipelineRecorder(), {QUIET})
from lightning_hetero.testing import SlowDown  # imported after both packages
pytorch_lightning.Trainer(strategy="hetero_ddp", callbacks=SlowDown([1, 2]), {QUIET})
lightning.pytorch.Trainer(strategy="hetero_ddp", callbacks=SlowDown([1, 2]), {QUIET})

class Own(HeteroDDPStrategy):
    pass

from lightning.fabric.plugins.environments import LightningEnvironment
for wrong in (Own(), HeteroDDPStrategy(cluster_environment=LightningEnvironment())):
    try:
        pytorch_lightning.Trainer(strategy=wrong, {QUIET})
    except lightning_hetero.exceptions.UnsupportedFeatureError as error:
        print(error)
"""
    own, plugin = printed_by(code).splitlines()
    assert "`Own` must derive from a strategy for the package of its Trainer" in own
    assert "`cluster_environment` must be an object of `pytorch_lightning`" in plugin


@pytest.mark.parametrize(
    ("alias", "of", "before"),
    [
        ("pytorch_lightning", "lightning", True),
        ("lightning.pytorch", "other", False),
        pytest.param("pytorch_lightning", "lightning", False, marks=thorough),
        pytest.param("lightning.pytorch", "other", True, marks=thorough),
    ],
)
def test_an_alias_is_no_other_package(before: bool, alias: str, of: str) -> None:
    real = "lightning.pytorch" if of == "lightning" else "pytorch_lightning"
    make = f"""
import sys, importlib
real = importlib.import_module("{real}")
for name, module in list(sys.modules.items()):
    if name == "{real}" or name.startswith("{real}."):
        sys.modules["{alias}" + name[len("{real}"):]] = module
"""
    lines = [make, "import lightning_hetero"]
    code = "\n".join([*(lines if before else lines[::-1])])
    code += f"""
lightning_hetero.register("mine", shares=[1, 3])
aliased = importlib.import_module("{alias}")
assert aliased is real
registry = importlib.import_module("{alias}.strategies").StrategyRegistry
assert issubclass(registry["hetero_ddp"]["strategy"], real.strategies.DDPStrategy)
for strategy in ("hetero_ddp", "mine", lightning_hetero.HeteroDDPStrategy()):
    trainer = aliased.Trainer(strategy=strategy, callbacks=[lightning_hetero.LoadBalancer()], {QUIET})
    assert isinstance(trainer.strategy, aliased.strategies.DDPStrategy)
print(sum(name.startswith("hetero_ddp") for name in registry))
"""
    assert printed_by(code) == "12"


CONFIG = """
trainer:
  strategy:
    class_path: {module}.HeteroDDPStrategy
    init_args:
      shares: [1, 3]
  callbacks:
    - class_path: {module}.LoadBalancer
      init_args:
        tune_steps: 5
  accelerator: cpu
  devices: 2
  logger: false
"""


@pytest.mark.parametrize(
    ("imports", "module"),
    [
        (BOTH, "lightning_hetero"),
        pytest.param(OURS_FIRST, "lightning_hetero", marks=thorough),
        pytest.param(BOTH, "lightning_hetero.pytorch_lightning", marks=thorough),
    ],
)
def test_classes_from_yaml(tmp_path: Path, imports: str, module: str) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG.format(module=module))
    code = f"""
{imports}
lightning_hetero.register("mine", shares=[1, 3])
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.demos.boring_classes import BoringModel
from lightning_hetero.pytorch_lightning.cli import HeteroCLI
for cls in (LightningCLI, HeteroCLI):
    for arguments in (["--config={tmp_path}/config.yaml"], ["--trainer.strategy=mine", "--trainer.devices=2"]):
        trainer = cls(BoringModel, run=False, args=arguments).trainer
        assert isinstance(trainer, pytorch_lightning.Trainer)
        assert pytorch_lightning.strategies.DDPStrategy in type(trainer.strategy).__mro__
        print(trainer.strategy.shares)
        assert "=mine" in arguments[0] or trainer.callbacks[0].tune_steps == 5
"""
    assert re.findall(r"\[.*\]", printed_by(code)) == ["[1.0, 3.0]", "[1, 3]"] * 2
