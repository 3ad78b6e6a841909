"""Which names a hook or a step mentions."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import grad_norm

from lightning_hetero.plugin.pipeline.hooks.names_read import is_users, names_before, names_read


def helper(module: Any) -> Any:
    return module.read_by_helper


class Module(LightningModule):
    after = read_before = read_in_argument = in_list = read_in_method = 1

    @property
    def read_by_property(self) -> Any:
        return self.behind_property

    def own(self) -> int:
        return self.read_in_method

    def shared_step(self, x: Any) -> Any:
        x = x * self.read_before
        y: Any = self.model(  # type: ignore[operator]
            x + self.read_in_argument,
            [self.in_list for _ in range(2)],
        )
        return y * self.after

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch = batch + self.own()
        return self.shared_step(batch) + self.after_everything

    def on_train_epoch_end(self) -> None:
        helper(self)
        if hasattr(self, "by_string"):
            self.read_by_property  # noqa: B018

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log_dict(grad_norm(self, 2))


def test_names_before_the_model_is_called() -> None:
    names = names_before(Module.training_step, Module(), "model")
    assert {"read_before", "read_in_argument", "in_list", "read_in_method"} <= names
    assert not {"after", "after_everything"} & names


def test_all_names_if_no_call_is_found() -> None:
    names = names_before(Module.training_step, Module(), "forward")
    assert {"after", "after_everything", "read_before"} <= names


def test_names_of_helpers_methods_properties_and_strings() -> None:
    names = names_read([Module.on_train_epoch_end], Module())
    assert {"read_by_helper", "by_string", "read_by_property", "behind_property"} <= names
    assert {"grad", "named_parameters"} <= names_read([Module().on_before_optimizer_step], Module())
    assert names_read([torch.relu, None, 3], Module()) == set()


def test_whose_function_it_is() -> None:
    module = Module()
    assert is_users(module.on_train_epoch_end)
    assert not is_users(module.on_validation_epoch_end)
    assert not is_users(None)
    assert is_users(torch.no_grad()(helper))
