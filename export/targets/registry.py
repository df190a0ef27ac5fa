"""The list of targets. A new one is a file beside this, a line here, and a line in ``precision.py``."""

from __future__ import annotations

from ...errors import HerdError
from ...model.quantization.recipes import RECIPES, Recipe
from .canonical import CANONICAL
from .cpu import CPU
from .cpu_stock import CPU_STOCK
from .cuda import CUDA
from .target import Target
from .tensorrt.target import TENSORRT, TENSORRT_RTX

TARGETS: dict[str, Target] = {
    target.name: target for target in (CPU, CPU_STOCK, CUDA, TENSORRT_RTX, TENSORRT, CANONICAL)}


def target_of(name: str, recipe: str | Recipe | None) -> tuple[Target, Recipe]:
    """A target and a recipe by name, checked against each other.

    Args:
        name: of the target.
        recipe: its name, None for the target's first; one of your own is taken as it is.

    Raises:
        HerdError: no such target or recipe, or the target does not know the recipe or its type of caches.
    """
    if name not in TARGETS:
        raise HerdError(f"no target is called {name!r}: choose one of {', '.join(TARGETS)}")
    target = TARGETS[name]
    recipe = target.recipes[0] if recipe is None else recipe
    if isinstance(recipe, str):
        if recipe not in target.recipes:
            raise HerdError(f"target {name} has no recipe {recipe!r}: choose one of {', '.join(target.recipes)}")
        recipe = RECIPES[recipe]
    if recipe.caches not in target.caches:
        raise HerdError(f"target {name} cannot store keys and values as {recipe.caches}: choose one of "
                        f"{', '.join(target.caches)}")
    return target, target.stored(recipe)
