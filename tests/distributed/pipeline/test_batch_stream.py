"""Every rank gets the batches of rank 0, whatever they are made of, and hears where there are no more."""

from __future__ import annotations

import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import RankError, RankPools
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lightning_hetero.distributed.data.loading_ahead import may_load_ahead
from lightning_hetero.distributed.pipeline import batch_stream
from lightning_hetero.distributed.pipeline.batch_stream import ReceivedBatches, SentBatches, end_iterations
from lightning_hetero.distributed.pipeline.packed_batch import empty_tensors, packed, unpacked

Pair = namedtuple("Pair", ["x", "y"])  # as users write them
LARGE = 50_000


@dataclass
class Sample:
    x: Tensor
    name: str


class Special(Tensor):
    pass


def tensors() -> dict[str, Tensor]:
    base = torch.arange(24.0).reshape(2, 3, 4)
    noted = torch.ones(2)
    noted.note = "kept"  # type: ignore[attr-defined]
    return {
        "whole": base,
        "a view": base[1:],
        "transposed": base.transpose(0, 2),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "every second": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "a number": torch.tensor(7),
        "nothing": torch.empty(0, 3),
        "truth": torch.tensor([True, False]),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "eight bits": torch.ones(3).to(torch.float8_e4m3fn),
        "complex": torch.tensor([1 + 2j]),
        "conjugated": torch.tensor([1 + 2j]).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "with a gradient": torch.ones(2, requires_grad=True),
        "a parameter": nn.Parameter(torch.ones(2)),
        "special": torch.ones(2).as_subclass(Special),
        "noted": noted,
    }


def assert_same(found: Tensor, expected: Tensor, name: str) -> None:
    assert type(found) is type(expected), name
    if name == "nested":
        assert all(torch.equal(a, b) for a, b in zip(found.unbind(), expected.unbind(), strict=True))
        return
    assert (found.dtype, found.shape, found.layout) == (expected.dtype, expected.shape, expected.layout), name
    assert found.requires_grad == expected.requires_grad, name
    assert getattr(found, "note", None) == getattr(expected, "note", None), name
    if found.layout == torch.strided and not found.is_quantized:  # as a copy lies in memory
        assert found.stride() == torch.empty_like(expected, device="meta").stride(), name
    assert torch.equal(plain(found), plain(expected)), name


def plain(tensor: Tensor) -> Tensor:
    """Return the values in a form that can be compared."""
    tensor = tensor.to_dense() if tensor.is_sparse else tensor
    tensor = tensor.dequantize() if tensor.is_quantized else tensor
    return tensor.float() if tensor.dtype == torch.float8_e4m3fn else tensor


def test_a_batch_is_the_same_after_it_was_packed() -> None:
    given = tensors()
    shared = torch.ones(2)
    batch = {"tensors": given, "others": [Pair(shared, {1}), Sample(shared, "a"), np.arange(3), None, "text", 1.5]}
    sent = packed(batch)
    assert len(sent.contents) >= 14  # of those that are nothing but their values, and of parts of the others
    received, contents = empty_tensors(sent.description)
    for mine, theirs in zip(contents, sent.contents, strict=True):
        mine.copy_(theirs)
    found = unpacked(sent.description, received)
    for name, tensor in given.items():
        assert_same(found["tensors"][name], tensor, name)
    pair, sample, array, *rest = found["others"]
    assert (type(pair), pair.y, sample.name, array.tolist(), rest) == (Pair, {1}, "a", [0, 1, 2], [None, "text", 1.5])
    assert pair.x is sample.x  # one tensor in two places stays one
    assert packed(batch).description == sent.description
    assert packed({**batch, "tensors": {"whole": torch.zeros(1)}}).description != sent.description


def batches(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Exception):
            raise value
        yield value


def iteration(values: list[Any], *, ahead: bool = False) -> Any:
    return SentBatches(batches(values), ahead=ahead) if dist.get_rank() == 0 else ReceivedBatches()


def numbered(count: int, size: int = LARGE) -> list[Any]:
    return [{"x": torch.full((size,), float(i)), "i": torch.tensor(i)} for i in range(count)]


def take(values: list[Any], ahead: bool) -> tuple[list[Any], list[int]]:
    """Return what each rank got, and the sizes of what rank 0 has sent to each of the others."""
    sizes: list[int] = []
    send = dist.isend

    def noted(tensor: Tensor, dst: int, **options: Any) -> Any:
        if dst == 1:
            sizes.append(tensor.numel() * tensor.element_size())
        return send(tensor, dst=dst, **options)

    got = []
    with mock.patch.object(dist, "isend", noted):
        stream = iteration(values, ahead=ahead)
        for batch in stream:
            got.append((int(batch["i"]), len(batch["x"]), float(batch["x"].sum()) / len(batch["x"])))
            batch["x"].add_(100)  # steps may change their batch
        assert next(stream, None) is None, "an iteration that has ended does not begin again"
    end_iterations()
    return got, sizes


@pytest.mark.parametrize("ahead", [False, True])
def test_every_rank_gets_every_batch_and_descriptions_are_sent_once(ranks: RankPools, ahead: bool) -> None:
    values = [*numbered(4), *numbered(1, LARGE // 2), *numbered(2)]  # a smaller batch in between
    shapes = [*((i, LARGE) for i in range(4)), (0, LARGE // 2), (0, LARGE), (1, LARGE)]
    expected = [(i, size, float(i)) for i, size in shapes]
    (first, sizes), *others = ranks.run(3, take, values, ahead, timeout_s=60)
    assert [first, *(got for got, _ in others)] == [expected] * 3
    heads, values_sent = sizes.count(16), sizes.count(4 * LARGE)
    assert (heads, values_sent, sizes.count(2 * LARGE)) == (7 + 1, 6, 1)
    descriptions = [size for size in sizes if size not in (16, 8, 4 * LARGE, 2 * LARGE)]
    assert len(descriptions) == 3  # where the shape changes
    assert max(descriptions) < 1_000


def use_slowly() -> tuple[list[str], list[bool]]:
    """Return in which order rank 0 loads and uses, and whether each next batch was here while one was used."""
    events: list[str] = []

    def load() -> Iterator[Any]:
        for i, value in enumerate(numbered(3)):
            events.append(f"load {i}")
            yield value

    stream: Any = SentBatches(load(), ahead=True) if dist.get_rank() == 0 else ReceivedBatches()
    here: list[bool] = []
    for i, _ in enumerate(stream):
        deadline = time.monotonic() + 20
        while dist.get_rank() and stream._received.empty() and time.monotonic() < deadline:
            time.sleep(0.01)
        here.append(not dist.get_rank() or not stream._received.empty())
        dist.barrier()
        events.append(f"used {i}")
    return events, here


def test_a_batch_travels_while_the_one_before_is_used(ranks: RankPools) -> None:
    first, second = ranks.run(2, use_slowly, timeout_s=60)
    assert first[0].index("load 1") < first[0].index("used 0")
    assert first[0].index("load 2") > first[0].index("used 0")  # one ahead, no more
    assert second[1] == [True] * 3  # at last, the end


def leave_early() -> list[int]:
    outer = iter(iteration(numbered(9), ahead=True))
    found = [int(next(outer)["i"])]
    for batch in iteration(numbered(9), ahead=True):  # an evaluation within an epoch
        found.append(int(batch["i"]))
        if len(found) == 3:
            break
    found += [int(next(outer)["i"]), int(next(outer)["i"])]
    if dist.get_rank() == 0:
        del outer
    found += [int(batch["i"]) for batch in iteration(numbered(2, 3), ahead=False)]
    end_iterations()
    alive = [thread for thread in threading.enumerate() if thread.name == "batches of rank 0"]
    return [*found, len(alive)]


def test_iterations_within_each_other_and_left_early(ranks: RankPools) -> None:
    assert ranks.run(3, leave_early, timeout_s=60) == [[0, 0, 1, 1, 2, 0, 1, 0]] * 3


def fail(how: str) -> tuple[list[int], str]:
    wrong: Any = KeyError("broken") if how == "loading" else {"x": lambda: 1}
    found = []
    try:
        for batch in iteration([*numbered(2), wrong], ahead=how == "loading"):
            found += [int(batch["i"])]
    except Exception as error:
        return found, f"{type(error).__name__}: {error}"
    return found, "no error"


@pytest.mark.parametrize("how", ["loading", "packing"])
def test_an_error_comes_with_its_batch(ranks: RankPools, how: str) -> None:
    first, second, third = ranks.run(3, fail, how, timeout_s=60)
    assert first[0] == second[0] == third[0] == [0, 1]
    expected = "KeyError: 'broken'" if how == "loading" else "pickle"
    assert expected in first[1]
    for _, message in (second, third):
        assert message.startswith("RankFailedError: Rank 0 could not load a batch:")
        assert expected in message


def leave_alone() -> None:
    stream = iter(iteration(numbered(3)))
    next(stream)
    if dist.get_rank() == 0:
        del stream
    else:
        next(stream)


def test_a_rank_that_goes_on_alone_is_told(ranks: RankPools) -> None:
    with pytest.raises(RankError, match="rank 0 has left the loop in which other ranks expect a batch of it"):
        ranks.run(2, leave_alone, timeout_s=30)


def wait_too_long() -> list[Any]:
    """Let rank 0 load until the others have given up once."""

    def load() -> Iterator[Any]:
        dist.barrier()
        yield numbered(1)[0]

    stream: Any = SentBatches(load(), ahead=False) if dist.get_rank() == 0 else ReceivedBatches()
    found: list[Any] = []
    if dist.get_rank():
        with mock.patch.object(batch_stream, "host_timeout", return_value=timedelta(seconds=0.2)):
            try:
                next(stream)
            except RuntimeError as error:
                found.append(str(error))
        dist.barrier()
    found.append(int(next(stream)["i"]))
    end_iterations()
    return found


def test_a_rank_waits_for_a_batch_as_long_as_for_anything_else(ranks: RankPools) -> None:
    first, second = ranks.run(2, wait_too_long, timeout_s=60)
    assert first == [0]
    assert second == ["gloo: timed out waiting 0 s for a batch of rank 0", 0]


def test_what_the_thread_could_not_receive_is_raised_where_the_batch_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(tensor: Tensor, **_: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "irecv", broken)
    monkeypatch.setattr(batch_stream, "host_timeout", lambda: timedelta(seconds=5))
    stream: Any = ReceivedBatches()
    stream._thread = threading.Thread(target=batch_stream._receive, args=(stream._received, None, 0))
    stream._thread.start()
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        next(stream)
    assert next(stream, None) is None
    stream._thread.join(5)


def send_to_nobody() -> tuple[list[int], str]:
    send = SentBatches._send
    found: list[int] = []

    def sent(stream: SentBatches, *message: Any) -> None:
        if found:
            raise RuntimeError("Connection closed by peer")
        send(stream, *message)

    with mock.patch.object(SentBatches, "_send", sent):
        stream = SentBatches(batches(numbered(3)), ahead=True)
        found.append(int(next(stream)["i"]))
        try:
            found += [int(batch["i"]) for batch in stream]
        except RuntimeError as error:
            return found, str(error)
    return found, "no error"


def test_rank_zero_raises_what_its_thread_could_not_send(ranks: RankPools) -> None:
    ((found, error),) = ranks.run(1, send_to_nobody, timeout_s=60)
    assert found[0] == 0
    assert len(found) < 3
    assert error == "Connection closed by peer"


class Counting(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


class OwnLoader(DataLoader[Any]):
    pass


class OwnSampler(SequentialSampler):
    pass


DATA: Any = list(range(6))


@pytest.mark.parametrize(
    ("loader", "may"),
    [
        (DataLoader(DATA, num_workers=1), True),
        (DataLoader(DATA, num_workers=1, shuffle=True), True),
        (DataLoader(DATA, num_workers=1, batch_size=None), True),
        (DataLoader(Counting(), num_workers=1), True),
        (DataLoader(DATA), False),
        (DataLoader(DATA, num_workers=1, shuffle=True, generator=torch.Generator()), False),
        (DataLoader(DATA, num_workers=1, sampler=RandomSampler(DATA, generator=torch.Generator())), False),
        (DataLoader(DATA, num_workers=1, sampler=OwnSampler(DATA)), False),
        (DataLoader(DATA, num_workers=1, batch_sampler=BatchSampler(OwnSampler(DATA), 2, drop_last=False)), False),
        (OwnLoader(DATA, num_workers=1), False),
        (DATA, False),
    ],
)
def test_a_batch_is_loaded_ahead_only_where_nobody_can_tell(loader: Any, may: bool) -> None:
    assert may_load_ahead(loader) == may
