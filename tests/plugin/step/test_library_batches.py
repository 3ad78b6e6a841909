"""Batches of libraries are counted and cut through the libraries' own functions; here with imitations of these."""

from __future__ import annotations

import sys
from collections import UserDict
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

from lightning_hetero.exceptions import UnsupportedFeatureError
from lightning_hetero.plugin.step.batch_size import samples_in
from lightning_hetero.plugin.step.split_batch import split_batch, tensors_in

X = torch.arange(10.0).view(5, 2)


class Data(dict[str, Any]):
    """A graph: tensors of its own length."""

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class Batch(Data):
    """Graphs after each other, with the number of each node's graph; ``x_batch`` if it was asked for."""

    graphs: list[Data]

    @classmethod
    def from_data_list(cls, graphs: Sequence[Data], follow_batch: Sequence[str] = ()) -> Batch:
        batch = cls({key: torch.cat([graph[key] for graph in graphs]) for key in graphs[0]})
        numbers = torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor([len(g["x"]) for g in graphs]))
        batch |= {"batch": numbers} | {f"{key}_batch": numbers for key in follow_batch}
        batch.graphs = list(graphs)
        return batch

    @property
    def num_graphs(self) -> int:
        return len(self.graphs)

    def to_data_list(self) -> list[Data]:
        return self.graphs


class TensorDict:
    """Tensors with common first dimensions, which is indexed as they are."""

    def __init__(self, tensors: dict[str, torch.Tensor], batch_size: Sequence[int]) -> None:
        self.tensors, self.batch_size = tensors, torch.Size(batch_size)

    def __getitem__(self, index: slice) -> TensorDict:
        found = {name: tensor[index] for name, tensor in self.tensors.items()}
        return TensorDict(found, [len(next(iter(found.values()))), *self.batch_size[1:]])

    def values(self, *, include_nested: bool, leaves_only: bool) -> Iterator[torch.Tensor]:
        assert include_nested
        assert leaves_only
        yield from self.tensors.values()


class BatchEncoding(UserDict):  # type: ignore[type-arg]
    """What a tokeniser returns: tensors, and its own data of each sample, which tells characters of tokens."""

    def __init__(self, data: Any, encoding: Any = None, n_sequences: int | None = None) -> None:
        super().__init__(data)
        self._encodings, self.n_sequences = encoding, n_sequences

    @property
    def encodings(self) -> Any:
        return self._encodings


@pytest.fixture(autouse=True)
def _libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls, module in (
        (Data, "torch_geometric.data"),
        (Batch, "torch_geometric.data"),
        (BatchEncoding, "transformers"),
    ):
        monkeypatch.setattr(cls, "__module__", module)
    geometric: Any = ModuleType("torch_geometric.data")
    geometric.Batch = Batch
    monkeypatch.setitem(sys.modules, "torch_geometric.data", geometric)
    tensordict: Any = ModuleType("tensordict")
    tensordict.is_tensor_collection = lambda value: isinstance(value, TensorDict)
    monkeypatch.setitem(sys.modules, "tensordict", tensordict)


def graphs(*nodes: int, follow: Sequence[str] = ()) -> Batch:
    """Return a batch of graphs with these numbers of nodes."""
    return Batch.from_data_list([Data(x=torch.full((n, 1), float(n))) for n in nodes], follow)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def test_graphs_are_divided_and_not_their_nodes() -> None:
    """As many nodes of all as there are graphs, in one of them, would be cut wrongly by a first dimension."""
    batch = graphs(1, 2, 3, 4, 5, follow=["x"])
    assert samples_in(batch) == samples_in([batch, torch.ones(15)]) == 5
    first, second = split_batch(batch, (3, 2))
    assert first["x"].flatten().tolist() == [1, 2, 2, 3, 3, 3]
    assert second["batch"].tolist() == second["x_batch"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1], "numbered again"
    assert type(first) is Batch
    assert sum(tensor.numel() for tensor in tensors_in(first)) == 3 * 6


def test_graphs_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="a 'Batch' of 2 graphs"):
        split_batch([X, graphs(1, 2)], (3, 2))
    with pytest.raises(UnsupportedFeatureError, match="a 'Data' that is no batch of graphs"):
        split_batch([X, Data(x=X)], (3, 2))
    batch = graphs(1, 1, 1, 1, 1)
    batch["y"] = X  # of the batch alone
    with pytest.raises(UnsupportedFeatureError, match=r"a 'Batch' with \['y'\], which its graphs do not have"):
        split_batch(batch, (3, 2))


# ---- TensorDict ------------------------------------------------------------------------------------------------------


def test_a_tensor_dict_says_itself_how_many_samples_it_has() -> None:
    batch = TensorDict({"x": X, "y": torch.arange(5)}, [5])
    assert samples_in(batch) == samples_in((batch, torch.ones(3))) == 5
    first, second = split_batch({"inner": batch}, (3, 2))
    assert isinstance(first["inner"], TensorDict)
    assert torch.equal(first["inner"].tensors["x"], X[:3])
    assert second["inner"].tensors["y"].tolist() == [3, 4]


@pytest.mark.parametrize("batch_size", [[], [2]])
def test_a_tensor_dict_of_other_samples_is_refused(batch_size: list[int]) -> None:
    batch = TensorDict({"x": torch.ones(2, 3)}, batch_size)
    with pytest.raises(
        UnsupportedFeatureError, match=rf"a 'TensorDict' with `batch_size` \[{', '.join(map(str, batch_size))}\]"
    ):
        split_batch([X, batch], (3, 2))
    if not batch_size:
        with pytest.raises(UnsupportedFeatureError, match="must know how many samples a batch has, got a 'TensorDict'"):
            samples_in(batch)


# ---- transformers ----------------------------------------------------------------------------------------------------


def test_an_encoding_keeps_what_its_tokeniser_knows_of_each_sample() -> None:
    first, second = split_batch(BatchEncoding({"ids": X}, list("abcde"), 1), (3, 2))
    assert isinstance(first, BatchEncoding)
    assert (first.encodings, second.encodings, second.n_sequences) == (list("abc"), list("de"), 1)
    assert torch.equal(second["ids"], X[3:])
    plain, _ = split_batch(BatchEncoding({"ids": X}), (3, 2))
    assert plain.encodings is None, "of a tokeniser in Python, which keeps nothing"
    with pytest.raises(UnsupportedFeatureError, match="a 'BatchEncoding' with 4 encodings"):
        split_batch(BatchEncoding({"ids": X}, list("abcd")), (3, 2))


# ---- anything else ---------------------------------------------------------------------------------------------------


class Bag:
    """Any iterable, into which Lightning looks too."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        yield X


class Forgetful(UserDict):  # type: ignore[type-arg]
    """A mapping that keeps something else than it is given."""

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        super().__setitem__(key, value.clone())


def test_samples_are_counted_as_lightning_counts_them() -> None:
    assert samples_in(Bag()) == 5
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    assert samples_in([torch.tensor(1.0), nested, X]) == 5, "the first tensor whose first dimension counts them"
    with pytest.raises(UnsupportedFeatureError, match="got a 'list' that holds no tensor"):
        samples_in(["a", "b"])


def test_numbers_of_samples_in_a_range_are_cut() -> None:
    first, second = split_batch([X, range(5), range(2)], (3, 2))
    assert first[1:] == [range(3), range(2)]
    assert second[1] == range(3, 5)


def test_a_mapping_that_does_not_keep_its_parts_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="a 'Forgetful', which cannot be written to"):
        split_batch(Forgetful({"x": X}), (3, 2))


def test_classes_in_a_batch_are_no_containers() -> None:
    assert [*tensors_in([X, torch.nn.Linear])] == [X]
