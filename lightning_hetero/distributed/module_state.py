"""Find what steps have changed in the attributes of a module, and give it to the other ranks.

Attributes are compared by a digest of their pickled form, in which a tensor is represented by its identity and the
number of its changes, so that no tensor is read.  What every rank has, such as the modules themselves, is a reference.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hetero.distributed.state_digest import Buffer, Digest, Numbers, is_local

__all__ = ["Changes", "ModuleState"]

_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}

Place = tuple[str, str]  # name of a submodule, and of its attribute


@dataclass
class Changes:
    """Attributes that have changed on one rank, to be sent to the others.

    Attributes:
        values: The changed attributes in pickled form, one text for all, so that objects they share stay shared.
        tensors: The tensors in them, in the memory of the host, and whether each was on the device of its rank.
        deleted: Attributes that are gone.
        refused: Attributes that cannot be sent, with the reason.
    """

    values: bytes = b""
    tensors: list[tuple[Tensor, bool]] = field(default_factory=list)
    deleted: list[Place] = field(default_factory=list)
    refused: dict[Place, str] = field(default_factory=dict)


class ModuleState:
    """The attributes of a module and its submodules that are neither parameters nor in its layers' tensors.

    Args:
        module: The whole model.
        device: Device of this rank.
        known: Function that returns objects that every rank has, by a name.
        leaves_out: Names of attributes of ``module`` itself that are not the user's.
        of_this_rank: Function that says, by the name of a submodule, whether its attributes are right on this rank.
        is_shared: Function that says whether a buffer is in no layer, so that every rank has it.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        known: Callable[[], Mapping[Any, Any]],
        leaves_out: Iterable[str],
        of_this_rank: Callable[[str], bool],
        is_shared: Callable[[Tensor], bool],
    ) -> None:
        self._module = module
        self._device = device
        self._known = known
        self._leaves_out = frozenset(leaves_out)
        self._of_this_rank = of_this_rank
        self._is_shared = is_shared
        self._before: dict[Place, tuple[bytes, list[Any]]] = {}
        self._numbers = Numbers()
        self._found: _Objects | None = None

    def begin(self, names: frozenset[str] | None = None) -> None:
        """Note the attributes as they are now; only those with one of ``names`` if that is given."""
        self._before = self._digests(names)

    def changes(self, names: frozenset[str] | None = None) -> Changes | None:
        """Return what has changed since :meth:`begin`, which was called with the same ``names``; None if nothing."""
        changed, deleted = self.changed(names)
        if not changed and not deleted:
            return None
        found = Changes(deleted=deleted)
        modules, known = self._objects.modules, self._objects.names
        values = {place: _get(modules[place[0]], place[1]) for place in changed}
        try:
            found.values, found.tensors = _pickled(values, known, self._leaves_of(values), self._device)
        except Exception:  # of at least one of them
            for place in changed:
                reason = _why_not_sent(values[place], known, self._leaves_of([place]), self._device)
                if reason is not None:
                    found.refused[place] = reason
                    del values[place]
            found.values, found.tensors = _pickled(values, known, self._leaves_of(values), self._device)
        return found

    def digests_of_changes(self) -> dict[Place, bytes | None]:
        """Return a digest of each attribute that has changed since :meth:`begin`, of which values count on any rank.

        It is None for what is gone or cannot be sent.
        """
        changed, deleted = self.changed()
        found: dict[Place, bytes | None] = dict.fromkeys(deleted)
        for place in changed:
            value = _get(self._objects.modules[place[0]], place[1])
            try:
                pickled, tensors = _pickled(value, self._objects.names, self._leaves_of([place]), self._device)
                contents = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t, _ in tensors)
                found[place] = hashlib.blake2b(pickled + contents, digest_size=16).digest()
            except Exception:  # objects raise whatever they like when they are pickled
                found[place] = None
        return found

    def changed(self, names: frozenset[str] | None = None) -> tuple[list[Place], list[Place]]:
        """Return the attributes that have changed since :meth:`begin`, and those that are gone."""
        now = self._digests(names)
        changed = [p for p, (digest, _) in now.items() if p not in self._before or self._before[p][0] != digest]
        return changed, [p for p in self._before if p not in now]

    def apply(self, changes: Changes) -> None:
        """Take over what has changed on another rank."""
        modules, known, names = self._objects.modules, self._objects.known, self._objects.names
        tensors = [t.to(self._device) if on_device else t for t, on_device in changes.tensors]
        leaves: dict[Place, list[Any]] = {}

        def local(place: Place, number: int) -> Any:
            if place not in leaves:
                leaves[place] = Digest.of(_get(modules[place[0]], place[1]), names, Numbers())[1]
            return leaves[place][number]

        values: dict[Place, Any] = _Receiving(io.BytesIO(changes.values), known, tensors, local).load()
        for (owner, name), value in values.items():
            _set(modules[owner], name, value)
        for owner, name in changes.deleted:
            modules[owner].__dict__.pop(name, None)

    def unsendable(self, owners: Collection[str]) -> str | None:
        """Return why an attribute of one of some submodules of this rank cannot be sent; None if all can."""
        for owner, part, _ in self._objects.own if owners else ():
            for name in vars(part).keys() - _OF_MODULES if owner in owners else ():
                # functions and classes are the same on all ranks, but iterators and files have a state of their own
                leaves = {key: at for key, at in self._leaves_of([(owner, name)]).items() if self._is_code(at)}
                reason = _why_not_sent(vars(part)[name], self._objects.names, leaves, self._device)
                if reason is not None:
                    return f"`{owner}.{name}` cannot be sent: {reason}"
        return None

    def _is_code(self, at: tuple[Place, int]) -> bool:
        place, number = at
        return isinstance(self._before[place][1][number], FunctionType | type | BuiltinFunctionType | ModuleType)

    def refresh(self) -> None:
        """Look for submodules and objects that every rank has again, at the next call."""
        self._found = None

    def _leaves_of(self, places: Iterable[Place]) -> dict[int, Any]:
        """Return where each object that cannot be sent was, at :meth:`begin`, by its identity."""
        return {id(leaf): (p, n) for p in places for n, leaf in enumerate(self._before.get(p, (b"", []))[1])}

    def _digests(self, names: frozenset[str] | None) -> dict[Place, tuple[bytes, list[Any]]]:
        found: dict[Place, tuple[bytes, list[Any]]] = {}
        objects = self._objects
        for owner, module, buffers in objects.own:
            attributes = vars(module)
            wanted = attributes.keys() - _OF_MODULES if names is None else attributes.keys() & names
            for name in (wanted - self._leaves_out) if module is self._module else wanted:
                found[owner, name] = Digest.of(attributes[name], objects.names, self._numbers)
            for name in buffers if names is None else buffers & names:
                buffer = Buffer(getattr(module, name))
                found[owner, name] = Digest.of(buffer, objects.names, self._numbers)
        if names is None:
            self._numbers.clean()
        return found

    @property
    def _objects(self) -> _Objects:
        if self._found is None:
            module = self._module
            known: dict[Any, Any] = dict(self._known())
            known |= {("module", name): value for name, value in module.named_modules(remove_duplicate=False)}
            known |= {("parameter", name): value for name, value in module.named_parameters(remove_duplicate=False)}
            known |= {("buffer", name): value for name, value in module.named_buffers(remove_duplicate=False)}
            own = []
            for name, part in module.named_modules():
                if self._of_this_rank(name):
                    buffers = {n for n, buffer in part.named_buffers(recurse=False) if self._is_shared(buffer)}
                    own.append((name, part, buffers))
            names = {id(value): name for name, value in reversed(known.items())}
            self._found = _Objects(dict(module.named_modules()), known, names, own)
        return self._found


@dataclass(frozen=True)
class _Objects:
    """What :class:`ModuleState` looks up once in a while.

    Attributes:
        modules: Submodules by name.
        known: Objects that every rank has, by name.
        names: Their names, by identity.
        own: Submodules whose attributes are right on this rank, with the names of their buffers that are in no layer.
    """

    modules: dict[str, nn.Module]
    known: dict[Any, Any]
    names: dict[int, Any]
    own: list[tuple[str, nn.Module, set[str]]]


def _get(module: nn.Module, name: str) -> Any:
    if name in vars(module):
        return vars(module)[name]
    return Buffer(getattr(module, name)) if name in dict(module.named_buffers(recurse=False)) else None


def _set(module: nn.Module, name: str, value: Any) -> None:
    if isinstance(value, Buffer):
        buffer: Tensor = getattr(module, name)
        if buffer.shape == value.value.shape and not buffer.is_inference():
            with torch.no_grad():
                buffer.copy_(value.value)
        else:
            buffer.data = value.value
        return
    before: Any = vars(module).get(name)
    # in place where possible: a callback may hold the same list
    if type(before) is type(value) and before is not value:
        if isinstance(value, list):
            before[:] = value
            return
        if isinstance(value, dict | set):
            copied = value.copy()
            before.clear()
            before.update(copied)
            return
    vars(module)[name] = value


# ---- sending ---------------------------------------------------------------------------------------------------------


class _Sending(pickle.Pickler):
    def __init__(self, sink: Any, known: Mapping[int, Any], local: Mapping[int, Any], device: torch.device) -> None:
        super().__init__(sink, protocol=5)
        self.tensors: list[tuple[Tensor, bool]] = []
        self._known, self._local, self._device = known, local, device
        self._sent: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Buffer):
            return ("buffer", self._number(obj.value))
        if id(obj) in self._known:
            return ("known", self._known[id(obj)])
        if isinstance(obj, Tensor):
            return ("tensor", self._number(obj), isinstance(obj, nn.Parameter), obj.requires_grad and obj.is_leaf)
        if is_local(obj):
            if id(obj) in self._local:
                return ("local", *self._local[id(obj)])
            raise TypeError(f"a {type(obj).__name__!r} is known to this process only")
        return None

    def _number(self, tensor: Tensor) -> int:
        number, _ = self._sent.get(id(tensor), (-1, tensor))
        if number < 0:
            if tensor.is_meta:
                raise TypeError("a tensor is in the memory of another rank")
            number = len(self.tensors)
            self._sent[id(tensor)] = number, tensor
            with torch.inference_mode(False):
                copy = tensor.detach().to("cpu", copy=True)
            self.tensors.append((copy, tensor.device == self._device))
        return number


def _pickled(
    value: Any, known: Mapping[int, Any], local: Mapping[int, Any], device: torch.device
) -> tuple[bytes, list[tuple[Tensor, bool]]]:
    sink = io.BytesIO()
    pickler = _Sending(sink, known, local, device)
    pickler.dump(value)
    return sink.getvalue(), pickler.tensors


def _why_not_sent(*arguments: Any) -> str | None:
    try:
        _pickled(*arguments)
    except Exception as error:
        return str(error) or type(error).__name__
    return None


class _Receiving(pickle.Unpickler):
    def __init__(
        self, source: Any, known: Mapping[Any, Any], tensors: list[Tensor], local: Callable[[Place, int], Any]
    ) -> None:
        super().__init__(source)
        self._known, self._tensors, self._local = known, tensors, local
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "known":
            return self._known[rest[0]]
        if kind == "local":
            return self._local(*rest)
        if kind == "buffer":
            return Buffer(self._tensors[rest[0]])
        number, is_parameter, requires_grad = rest
        if number not in self._made:
            tensor = self._tensors[number]
            self._made[number] = nn.Parameter(tensor, requires_grad) if is_parameter else tensor
            if requires_grad:
                self._made[number].requires_grad_()
        return self._made[number]
