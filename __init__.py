"""herdgraph: the compiled-graph framework for the Llama 4 herd, from a laptop CPU to a GPU cluster.

>>> from herdgraph import Engine
>>> with Engine.load("bundle") as engine:
...     print(engine.generate("Once upon a time", max_new_tokens=32).text)

Packages: ``model`` (definition, checkpoints, text and image processing), ``export`` (canonical graph, passes, targets),
``runtimes`` (bundles and the torch-free engine) and ``build`` (checkpoint -> bundle). See docs/structure.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import HerdError
    from .runtimes import Bundle, Engine, Generation, Sampling, Sequence, TextStream

__all__ = ["Bundle", "Engine", "Generation", "HerdError", "Sampling", "Sequence", "TextStream"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Names are imported when they are used: ``herdgraph --help`` needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".errors" if name == "HerdError" else ".runtimes", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
