"""The classes of this package for Trainers of ``pytorch_lightning``.

If the process has imported ``pytorch_lightning`` alone, ``from lightning_hetero import ...`` gives these classes. This
module is needed only where both packages are in one process, for example to derive a class from a strategy.

The classes are made from the files of ``lightning_hetero.plugin``, as Lightning makes ``pytorch_lightning`` from those
of ``lightning.pytorch``: each file is executed a second time, under another name and with other imports.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_hetero.lightning_packages import CLASSES, PACKAGES

if TYPE_CHECKING:
    from lightning_hetero.plugin.balancing.largest_batch import LargestBatchFinder
    from lightning_hetero.plugin.balancing.load_balancer import LoadBalancer
    from lightning_hetero.plugin.ddp.strategy import HeteroDDPStrategy
    from lightning_hetero.plugin.fsdp.strategy import HeteroFSDPStrategy
    from lightning_hetero.plugin.pipeline.recorder import PipelineRecorder
    from lightning_hetero.plugin.pipeline.strategy import HeteroPipelineStrategy

__all__ = [
    "HeteroDDPStrategy",
    "HeteroFSDPStrategy",
    "HeteroPipelineStrategy",
    "LargestBatchFinder",
    "LoadBalancer",
    "PipelineRecorder",
]

__path__: list[str] = []  # the finder below knows where its modules are

_ROOT = Path(__file__).parent
# what the files import, and what they get
_INSTEAD = {
    "lightning.pytorch": "pytorch_lightning",
    "lightning.fabric": "lightning_fabric",
    "lightning_hetero.plugin": __name__,
    "lightning_hetero.testing": f"{__name__}.testing",
    "lightning_hetero.cli": f"{__name__}.cli",
}


def _import(name: str, *args: Any, **kwargs: Any) -> Any:
    """Import as ``__import__`` does, but what the mirrored files need instead of ``name``."""
    for original, instead in _INSTEAD.items():
        if name == original or name.startswith(f"{original}."):
            name = instead + name.removeprefix(original)
            break
    return builtins.__import__(name, *args, **kwargs)


class _MirroringLoader(SourceFileLoader):
    """Executes a file of ``lightning_hetero.plugin`` under another name; the compiled code is that of the original."""

    @override
    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _MirroringFinder(MetaPathFinder):
    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        relative = fullname.removeprefix(f"{__name__}.")
        base = _ROOT if relative in ("testing", "cli") else _ROOT / "plugin"
        file = base.joinpath(*relative.split(".")).with_suffix(".py")
        package = file.with_suffix("") / "__init__.py"
        if package.exists():
            loader = _MirroringLoader(fullname, str(package))
            return spec_from_file_location(fullname, package, loader=loader, submodule_search_locations=[])
        if file.exists():
            return spec_from_file_location(fullname, file, loader=_MirroringLoader(fullname, str(file)))
        return None


sys.meta_path.insert(0, _MirroringFinder())
_import("lightning.pytorch")  # before any of the files, which the end of this import may ask for
if not TYPE_CHECKING:
    for _name in CLASSES:
        globals()[_name] = PACKAGES[1].public(_name)
