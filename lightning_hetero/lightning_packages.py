"""The two packages in which Lightning is published, and this package's classes for each.

``lightning.pytorch`` and ``pytorch_lightning`` have the same code, but each has its own classes: the Trainer of one
does not accept the strategies of the other. So this package has its classes twice too: in ``lightning_hetero.plugin``,
and in ``lightning_hetero.pytorch_lightning``, where they are made from the same files. Neither is imported before the
Lightning package that it belongs to.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

from typing_extensions import override

from lightning_hetero.exceptions import ConfigurationError, UnsupportedFeatureError

__all__ = [
    "CLASSES",
    "PACKAGES",
    "LightningPackage",
    "activate",
    "become_native",
    "is_foreign",
    "package_in_use",
    "register",
    "with_either_trainer",
]

# public classes, and where the plugin has them
CLASSES = {
    "HeteroDDPStrategy": "ddp.strategy",
    "HeteroFSDPStrategy": "fsdp.strategy",
    "HeteroPipelineStrategy": "pipeline.strategy",
    "LargestBatchFinder": "balancing.largest_batch",
    "LoadBalancer": "balancing.load_balancer",
    "PipelineRecorder": "pipeline.recorder",
}


class LightningPackage(NamedTuple):
    """One of the two packages.

    Attributes:
        pytorch: Name of its part with the Trainer.
        plugin: Name of the package that holds this package's classes for it.
    """

    pytorch: str
    plugin: str

    @property
    def is_imported(self) -> bool:
        """Whether the process has imported it; an alias that the user has made for the other package is not it."""
        return getattr(sys.modules.get(self.pytorch), "__name__", None) == self.pytorch

    def attribute(self, module: str, name: str) -> Any:
        """Return an attribute of a module of the plugin."""
        return getattr(import_module(f"{self.plugin}.{module}"), name)

    def public(self, name: str) -> Any:
        """Return one of this package's public classes."""
        return self.attribute(CLASSES[name], name)

    @property
    def registry(self) -> Any:
        """The registry in which its Trainer looks up names of strategies."""
        return import_module(f"{self.pytorch}.strategies").StrategyRegistry


PACKAGES = (
    LightningPackage("lightning.pytorch", "lightning_hetero.plugin"),
    LightningPackage("pytorch_lightning", "lightning_hetero.pytorch_lightning"),
)


def package_in_use() -> LightningPackage:
    """Return the package whose classes the public names of ``lightning_hetero`` stand for."""
    default, other = PACKAGES
    return other if other.is_imported and not default.is_imported else default


# ---- registration ----------------------------------------------------------------------------------------------------

_active: list[LightningPackage] = []
# what the user has registered: the name of one of our strategies, and its arguments
_registered: dict[str, tuple[str, dict[str, Any]]] = {}


def activate() -> None:
    """Register the strategies with both packages: with one that is imported now, with the other when it is imported."""
    for package in PACKAGES:
        if package.is_imported:
            _activate(package)
        elif not any(isinstance(finder, _Awaited) and finder.package == package for finder in sys.meta_path):
            sys.meta_path.insert(0, _Awaited(package))


def _activate(package: LightningPackage) -> None:
    if package in _active:
        return
    package.attribute("registry", "register_strategies")()
    for name in CLASSES:
        package.public(name)  # LightningCLI finds classes by their names alone once they are defined
    _active.append(package)
    for name in _registered:
        _register_with(package, name)
    for one, other in (_active, _active[::-1]) if len(_active) > 1 else ():
        # the Trainer of one takes a strategy for the other, which then changes its class: see `become_native`
        base = import_module(f"{one.pytorch}.strategies").DDPStrategy
        base.register(other.attribute("common.base_strategy", "BaseStrategy"))
    for callback in _callbacks:
        _add_bases(callback)


class _Awaited(MetaPathFinder):
    """Waits until a package of Lightning is imported; importing it for its registry alone would take seconds."""

    def __init__(self, package: LightningPackage) -> None:
        self.package = package

    @override
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.package.pytorch:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_activate(module: ModuleType) -> None:
                execute(module)
                sys.meta_path.remove(self)
                _activate(self.package)

            spec.loader.exec_module = execute_and_activate  # type: ignore[method-assign]
        return spec


def register(name: str, strategy: str = "hetero_ddp", **arguments: Any) -> None:
    """Register a strategy with its arguments under a name, for libraries and configurations that take only a name.

    Both ``lightning.pytorch`` and ``pytorch_lightning`` know the name, whichever is imported first. Registering a name
    a second time replaces what was registered the first time.

    Args:
        name: The name for ``Trainer(strategy=...)``, in lower case. It must not be a name of Lightning or of this
            package.
        strategy: The strategy that gets the arguments: "hetero_ddp", "hetero_fsdp", "hetero_pipeline", or a longer
            name of their families such as "hetero_ddp_spawn".
        **arguments: Arguments of :class:`HeteroDDPStrategy`, :class:`HeteroFSDPStrategy` or
            :class:`HeteroPipelineStrategy`.

    Raises:
        ConfigurationError: The name cannot be used, or an argument breaks its rule.

    Example::

        lightning_hetero.register("one_to_three", shares=[1, 3])
        trainer = Trainer(strategy="one_to_three", devices=2)
    """
    package = package_in_use()
    import_module(package.pytorch)
    _activate(package)
    ours = [known for known in package.registry if known.startswith("hetero_") and known not in _registered]
    if not isinstance(strategy, str) or strategy not in ours:
        raise ConfigurationError(f"`strategy` must be one of {', '.join(map(repr, ours))}, got {strategy!r}.")
    if not isinstance(name, str) or not name or name != name.lower():
        raise ConfigurationError(f"`name` must be a name in lower case, as Trainers look it up, got {name!r}.")
    taken = any(name in known.registry for known in _active) and name not in _registered
    if taken or name == "auto":
        raise ConfigurationError(f"`name` must be a new name, got {name!r}, which Trainers know already.")
    entry = package.registry[strategy]
    entry["strategy"](**{**entry["init_params"], **arguments})  # raises if an argument is wrong
    _registered[name] = (strategy, arguments)
    for known in _active:
        _register_with(known, name)


def _register_with(package: LightningPackage, name: str) -> None:
    strategy, arguments = _registered[name]
    entry = package.registry[strategy]
    package.registry.register(
        name,
        entry["strategy"],
        description=f"{strategy} with {arguments}",
        override=True,
        **{**entry["init_params"], **arguments},
    )


# ---- callbacks -------------------------------------------------------------------------------------------------------

_callbacks: list[type[Any]] = []
Class = TypeVar("Class", bound="type[Any]")


def with_either_trainer(callback: Class) -> Class:
    """Make a class of callbacks a subclass of the ``Callback`` of both packages, once both are imported.

    Callbacks use only what the Trainers of both packages have, so they need not be converted. But a Trainer takes a
    single callback, and LightningCLI a class path, only if it is a ``Callback`` of their package.
    """
    _callbacks.append(callback)
    _add_bases(callback)
    return callback


def _add_bases(callback: type[Any]) -> None:
    for package in _active:
        base = import_module(package.pytorch).Callback
        if not issubclass(callback, base):
            callback.__bases__ = (*callback.__bases__, base)


# ---- strategies ------------------------------------------------------------------------------------------------------


def is_foreign(accelerator: object, own: type[Any]) -> bool:
    """Return whether the Trainer of the other package has made an accelerator.

    Args:
        accelerator: The accelerator that a strategy is given.
        own: The base class of accelerators in the package that the strategy was made for.
    """
    if accelerator is None or isinstance(accelerator, own):
        return False
    return any(isinstance(accelerator, import_module(p.pytorch).accelerators.Accelerator) for p in _active)


def become_native(strategy: Any) -> None:
    """Turn a strategy, in place, into one of the same arguments for the Trainer of the other package.

    Raises:
        UnsupportedFeatureError: The strategy's class is the user's own, or it was given a plugin of the package that it
            was made for.
    """
    cls = type(strategy)
    own, other = PACKAGES if cls.__module__.startswith(PACKAGES[0].plugin + ".") else PACKAGES[::-1]
    if not cls.__module__.startswith(own.plugin + "."):
        raise UnsupportedFeatureError(
            f"`{cls.__name__}` must derive from a strategy for the package of its Trainer, got a Trainer of another"
            f" package. For `pytorch_lightning`, derive it from the class in `lightning_hetero.pytorch_lightning`; for"
            f" `lightning.pytorch`, import that package before you import the class from `lightning_hetero`."
        )
    native = other.attribute(cls.__module__.removeprefix(own.plugin + "."), cls.__name__)
    fresh = vars(native())
    for name, value in _of_user(vars(strategy), fresh):
        if _is_of_lightning(value):
            raise UnsupportedFeatureError(
                f"`{name.lstrip('_')}` must be an object of `{other.pytorch}`, as the Trainer is, got"
                f" {type(value).__module__}.{type(value).__name__}."
            )
        fresh[name] = value
    strategy.__dict__.clear()
    strategy.__class__ = native
    vars(strategy).update(fresh)
    strategy.renew()  # the parts know the object that they were made with


def _of_user(values: dict[str, Any], fresh: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what may come from the user: everything but the objects that each new strategy has."""
    for name, value in values.items():
        if not (_is_of_lightning(value) and _is_of_lightning(fresh.get(name))):
            yield name, value


def _is_of_lightning(value: Any) -> bool:
    package = type(value).__module__.partition(".")[0]
    return package in ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_hetero")
