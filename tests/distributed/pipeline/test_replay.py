"""Stages run the model's own forward pass: models of unusual shape give what they give whole, or are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_hetero.distributed.pipeline.replay import Replay
from lightning_hetero.distributed.pipeline.structure import Call
from lightning_hetero.distributed.pipeline.units import layers_in
from lightning_hetero.exceptions import UnsupportedFeatureError

X = torch.arange(12.0).view(4, 3) / 12


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # which torch sets for its tensors without memory


def staged(model: nn.Module, layers: Sequence[Sequence[nn.Module]], *args: Any) -> Any:
    """Return the output of a model with each layer on a stage of its own."""
    replay, value = Replay(model, layers), None
    for number in range(len(layers)):
        value = replay.run(range(number, number + 1), value, Call(args))
    return value


class Experts(nn.Module):
    """Routes each sample by its value, which a tensor without memory does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert, chosen in zip(self.experts, (x[:, 0] < 0.3, x[:, 0] >= 0.3), strict=True):
            if int(chosen.sum()):
                out[chosen] = expert(x[chosen])
        return out


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return (self.own(x) > 0).sum(1)


class Repeating(nn.Module):
    """Returns as many rows as its input says: not even their number is known without values."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 3)

    def forward(self, numbers: Tensor) -> Any:
        return self.table(numbers.repeat_interleave(numbers))


class Chain(nn.Module):
    """Calls some of its layers, one after another."""

    def __init__(self, *layers: nn.Module, called: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.called = range(len(layers)) if called is None else called

    def forward(self, x: Any) -> Any:
        for number in self.called:
            x = self.layers[number](x)
        return x

    @property
    def alone(self) -> list[tuple[nn.Module, ...]]:
        """Each layer by itself."""
        return [(layer,) for layer in self.layers]


def linear() -> nn.Module:
    return nn.Linear(3, 3)


def test_layers_that_look_at_values_can_be_on_any_stage() -> None:
    """Their output has the shape of their input, as that of experts in transformers."""
    model = Chain(linear(), Experts(), Experts(), linear())
    torch.testing.assert_close(staged(model, model.alone, X), model(X), rtol=0, atol=0)


def test_a_layer_whose_shape_depends_on_values_says_what_it_cannot() -> None:
    model = Chain(Counting(), Repeating(), linear())
    with pytest.raises(
        UnsupportedFeatureError, match=r"shape .* 'layers.1' .* depends on values.*`pipeline_layers\(\)`"
    ):
        staged(model, model.alone, X)


def test_layers_that_are_not_called_hand_on_what_they_get() -> None:
    model = Chain(linear(), linear(), linear(), called=[0, 2])
    torch.testing.assert_close(staged(model, model.alone, X), model(X), rtol=0, atol=0)


class Around(nn.Module):
    """A layer that contains another, which the model has called before."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared, self.own = shared, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.own(self.shared(x).tanh())


def test_a_layer_within_a_later_one_runs_there_too() -> None:
    shared = linear()
    model = Chain(shared, Around(shared), linear())
    torch.testing.assert_close(staged(model, model.alone, X), model(X), rtol=0, atol=0)


class Remembering(nn.Module):
    """Its first layer leaves something for its third, besides what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.last = linear(), linear(), Reading(self), linear()

    def forward(self, x: Tensor) -> Any:
        self.__dict__["kept"] = self.first(x)
        return self.last(self.third(self.second(self.kept)))


class Reading(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.own = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        kept: Any = self.__dict__["model"].kept
        return self.own(x + kept)


def test_what_a_layer_takes_from_an_earlier_one_by_another_way_is_refused() -> None:
    model = Remembering()
    layers = [(model.first,), (model.second,), (model.third,), (model.last,)]
    with pytest.raises(UnsupportedFeatureError, match="'third' also uses that of an earlier one"):
        staged(model, layers, X)


class Wrapping(nn.Module):
    """As transformers does, wraps the ``forward`` of each class that derives from it."""

    calls: ClassVar[list[str]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own: Callable[..., Any] = cls.forward

        def forward(self: nn.Module, *args: Any) -> Any:
            Wrapping.calls.append(type(self).__name__)
            return own(self, *args)

        cls.forward = forward


class Wrapped(Wrapping):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.own(x)


def test_a_class_that_wraps_what_derives_from_it_wraps_a_call_once() -> None:
    model = Chain(Wrapped(), linear())
    expected, Wrapping.calls[:] = model(X), []
    replay = Replay(model, model.alone)
    call = Call((X,))
    replay.prepare(call)
    Wrapping.calls.clear()
    first = replay.run(range(1), None, call)
    assert Wrapping.calls == ["Wrapped"]
    torch.testing.assert_close(replay.run(range(1, 2), first, call), expected, rtol=0, atol=0)


# ---- models of libraries, in small -----------------------------------------------------------------------------------


class Embedded(nn.Module):
    """Adds up embeddings of tokens and positions, as GPT-2 does: only their sum can be handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(8, 3), nn.Embedding(4, 3)
        self.blocks = nn.ModuleList(linear() for _ in range(3))

    def forward(self, numbers: Tensor) -> Any:
        x = self.tokens(numbers) + self.positions(torch.arange(len(numbers)))
        for block in self.blocks:
            x = block(x)
        return x


def test_embeddings_that_are_added_up_are_one_layer_with_the_first_block() -> None:
    model = Embedded()
    found = layers_in(model)
    assert found == [(model.tokens, model.positions, model.blocks[0]), (model.blocks[1],), (model.blocks[2],)]
    numbers = torch.tensor([3, 1, 2, 0])
    torch.testing.assert_close(staged(model, found, numbers), model(numbers), rtol=0, atol=0)


class OPTForCausalLM(nn.Module):
    """The parts of OPT, whose positions come after its layers in the order of attributes."""

    def __init__(self, *, projects: bool) -> None:
        super().__init__()
        decoder: Any = nn.Module()
        decoder.embed_tokens, decoder.embed_positions = nn.Embedding(8, 3), nn.Embedding(8, 3)
        decoder.project_in = nn.Linear(3, 3) if projects else None
        decoder.project_out = nn.Linear(3, 3) if projects else None
        decoder.final_layer_norm = nn.LayerNorm(3)
        decoder.layers = nn.ModuleList(linear() for _ in range(2))
        self.model = nn.Module()
        self.model.decoder, self.lm_head = decoder, nn.Linear(3, 8)

    def forward(self, numbers: Tensor) -> Any:
        decoder: Any = self.model.decoder
        x = decoder.embed_tokens(numbers)
        x = x if decoder.project_in is None else decoder.project_in(x)
        x = x + decoder.embed_positions(numbers)
        for layer in decoder.layers:
            x = layer(x)
        x = decoder.final_layer_norm(x)
        return self.lm_head(x if decoder.project_out is None else decoder.project_out(x))


@pytest.mark.parametrize("projects", [False, True])
def test_the_layers_of_opt_come_in_the_order_of_their_calls(projects: bool) -> None:
    model, numbers = OPTForCausalLM(projects=projects), torch.tensor([3, 1, 2, 0])
    found = layers_in(model)
    assert [len(layer) for layer in found] == [4 if projects else 3, *[1] * (4 if projects else 3)]
    torch.testing.assert_close(staged(model, found, numbers), model(numbers), rtol=0, atol=0)


def test_a_decoder_beside_an_encoder_stays_together() -> None:
    """Each of its layers uses what the encoder has returned."""
    model = nn.Module()
    model.encoder, model.decoder = (nn.ModuleList(linear() for _ in range(2)) for _ in range(2))
    assert layers_in(model) == [(model.encoder[0],), (model.encoder[1],), (model.decoder,)]
