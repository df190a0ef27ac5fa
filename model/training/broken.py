"""Where values stop being numbers: the first layer of a forward pass, the first parameter of a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def first_broken_output(model: nn.Module) -> Iterator[list[str]]:
    """Names, in order, of the modules without children whose output is not finite while the context lasts."""
    bad: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: bad.append(name) if _is_broken(out) else None)
        for name, module in model.named_modules() if not list(module.children())
    ]
    yield bad
    for hook in hooks:
        hook.remove()


def bad_gradient(model: nn.Module) -> str:
    """The first parameter whose gradient is not finite."""
    return next((name for name, parameter in model.named_parameters()
                 if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())), "no parameter")


def _is_broken(output: object) -> bool:
    return isinstance(output, Tensor) and output.is_floating_point() and not bool(torch.isfinite(output).all())
