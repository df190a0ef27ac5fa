"""Mixed-precision search: the fewest parts of a model in high precision that keep its KL within a bound.

Parts are attention, dense feed-forwards, shared experts, routed experts, and the image tower. A sensitivity analysis
evaluates the model with each of them alone in high precision and everything else in FP8; then the parts that help most
are added one after another until the bound is met. That is greedy: two parts that only help together are found late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import HerdError
from ..model.checkpoint.reader import TensorReader
from ..model.quantization.parts import parts_of
from ..model.quantization.recipes import Recipe
from .evaluate import Evaluation, Quality, evaluate
from .matmul_backends import Quantized
from .windows import Window

MakeBackend = Callable[[Recipe], Quantized]


def search(
    source: TensorReader, recipe: Recipe, make_backend: MakeBackend, windows: Sequence[Window], max_kl: float,
    on_layer: Callable[[], None] = lambda: None,
) -> tuple[list[str], dict[str, Quality]]:
    """Find the parts that stay in high precision.

    Args:
        source: the checkpoint.
        recipe: everything in FP8.
        make_backend: computes the products of a recipe.
        windows: held out.
        max_kl: bound on the mean KL per token, nats.
        on_layer: called after every layer of every pass, for progress.

    Returns:
        The parts by name (see ``parts_of``), and the quality of all that was tried, by the parts in high precision.

    Raises:
        HerdError: the bound is missed with all parts in high precision.
    """
    parts = parts_of(source.config)

    def with_high_precision(names: Sequence[str]) -> Recipe:
        return recipe.with_high_precision([rule for name in names for rule in parts[name]])

    singles: dict[tuple[str, ...], Recipe] = {(part,): with_high_precision([part]) for part in parts}
    alone = _evaluated(source, {(): recipe, **singles}, make_backend, windows, on_layer)
    tried = dict(alone)
    if alone[()].mean_kl <= max_kl:
        return [], _by_name(tried)
    order = sorted(parts, key=lambda part: alone[part,].mean_kl)
    growing = {tuple(order[:count]): with_high_precision(order[:count]) for count in range(2, len(order) + 1)}
    tried |= _evaluated(source, growing, make_backend, windows, on_layer) if growing else {}
    for count in range(1, len(order) + 1):
        if tried[tuple(order[:count])].mean_kl <= max_kl:
            return order[:count], _by_name(tried)
    best = tried[tuple(order)].mean_kl
    raise HerdError(f"no choice of parts keeps KL within {max_kl:g}: with all of them in high precision it is "
                    f"{best:.3g}; raise the bound")


def _evaluated(
    source: TensorReader, recipes: dict[tuple[str, ...], Recipe], make_backend: MakeBackend, windows: Sequence[Window],
    on_layer: Callable[[], None],
) -> dict[tuple[str, ...], Quality]:
    names = {parts: ", ".join(parts) or "fp8" for parts in recipes}
    backends = {names[parts]: make_backend(recipe) for parts, recipe in recipes.items()}
    found: Evaluation = evaluate(source, backends, windows, on_layer=on_layer)
    return {parts: found.variants[name] for parts, name in names.items()}


def _by_name(tried: dict[tuple[str, ...], Quality]) -> dict[str, Quality]:
    return {", ".join(parts) or "nothing": quality for parts, quality in tried.items()}
