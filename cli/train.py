"""The train command: a recipe by name, its options as NAME=VALUE."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ..console import HerdCommand, emit_json, progress, succeed, table
from ..errors import HerdError

_NAMES = ("align", "pretrain", "distil", "upcycle_then_distil", "long_context")


@click.command(cls=HerdCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Choice(_NAMES))
@click.argument("overrides", nargs=-1, metavar="[NAME=VALUE]...")
@click.option("--options", "show_options", is_flag=True, help="List the recipe's options and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def train(recipe: str, overrides: tuple[str, ...], show_options: bool, as_json: bool) -> None:
    """Train a model by a recipe.

    Options are given as NAME=VALUE, nested ones with a dot: output=run data=corpus/ checkpoint=calf
    train.steps=2000 optimizer.learning_rate=1e-3. Started by torchrun it uses all processes. A run continues from the
    last checkpoint in its output.
    """
    from ..model.training.recipes import RECIPES

    run, kind = RECIPES[recipe]
    if show_options:
        table(f"options of {recipe}", list(_described(kind)))
        return
    options = parsed(kind, overrides)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with progress(*columns, quiet=as_json) as bar:
        task = bar.add_task("starting", total=options.train.steps)

        def on_step(done: Any, record: dict[str, float]) -> None:
            text = f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tokens/s, MFU {record['mfu']:.0%}"
            bar.update(task, completed=done.step, description=text)

        found = run(options, on_step)  # type: ignore[operator]
    held_out = found.held_out.get(found.step)
    if as_json:
        emit_json({"steps": found.step, "tokens": found.tokens, "loss": found.losses[-1] if found.losses else None,
                   "held_out": held_out, "model": str(options.output / "model")})
    else:
        judged = "" if held_out is None else f", held-out loss {held_out:.4f}"
        succeed("trained", f"{options.output / 'model'}: {found.step} steps, {found.tokens} tokens{judged}")


def parsed(kind: type, overrides: tuple[str, ...]) -> Any:
    """Options of a dataclass from NAME=VALUE texts.

    Raises:
        HerdError: an unknown name, a value of another kind, or a name that has to be given and is not.
    """
    values: dict[str, Any] = {}
    for text in overrides:
        name, separator, value = text.partition("=")
        if not separator:
            raise HerdError(f"{text!r} is no option: options are given as NAME=VALUE")
        _put(values, kind, name.split("."), value)
    return _made(kind, values, "")


def _put(values: dict[str, Any], kind: type, path: list[str], text: str) -> None:
    hints = typing.get_type_hints(kind)
    name, rest = path[0], path[1:]
    if name not in hints:
        raise HerdError(f"there is no option {name!r}: choose among {', '.join(sorted(hints))}")
    if rest:
        if not dataclasses.is_dataclass(hints[name]):
            raise HerdError(f"option {name!r} has no parts, {'.'.join(rest)!r} was given")
        _put(values.setdefault(name, {}), hints[name], rest, text)
    elif hints[name] == tuple[Path, ...]:
        values.setdefault(name, ())
        values[name] += tuple(Path(part) for part in text.split(","))
    else:
        values[name] = _value(name, hints[name], text)


def _value(name: str, hint: Any, text: str) -> Any:
    """A text as a value of a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if text not in arguments:
            raise HerdError(f"{name} is {text!r}, it must be one of {', '.join(map(str, arguments))}")
        return text
    if origin in (types.UnionType, typing.Union):
        return None if text.lower() == "none" else _value(name, arguments[0], text)
    if origin is tuple:
        return tuple(_value(name, arguments[0], part) for part in text.split(","))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise HerdError(f"{name} is {text!r}, it must be true or false")
        return text.lower() == "true"
    if dataclasses.is_dataclass(hint):
        first = next(iter(typing.get_type_hints(hint)))
        raise HerdError(f"{name} has parts: give them one by one, as in {name}.{first}=")
    try:
        return hint(text)
    except ValueError as error:
        raise HerdError(f"{name} is {text!r}, a {hint.__name__} is needed") from error


def _made(kind: type, values: dict[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(kind)
    given = {name: _made(hints[name], value, f"{prefix}{name}.") if isinstance(value, dict) else value
             for name, value in values.items()}
    missing = [f"{prefix}{field.name}" for field in dataclasses.fields(kind) if field.name not in given
               and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
    if missing:
        raise HerdError(f"{missing[0]} has to be given: {missing[0]}=VALUE (--options lists all)")
    return kind(**given)


def _described(kind: Any, prefix: str = "") -> Any:
    """Names and defaults of all options."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _described(hint, f"{prefix}{field.name}.")
        elif field.default is not dataclasses.MISSING:
            yield f"{prefix}{field.name}", str(field.default)
        else:
            made = field.default_factory
            yield f"{prefix}{field.name}", "has to be given" if made is dataclasses.MISSING else str(made())
