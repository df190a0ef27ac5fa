"""herdgraph: the compiled-graph framework for the Llama 4 herd, from a laptop CPU to a GPU cluster.

Packages: ``model`` (definition, checkpoints, text and image processing), ``export`` (canonical graph, passes, targets),
``runtimes`` (bundles and the torch-free engine) and ``build`` (checkpoint -> bundle). See docs/structure.md.
"""

__version__ = "0.1.0"
