"""Many requests on one engine: continuous batching, prefix caching, priorities, preemption. Knows nothing of HTTP."""

from .answer import Answer
from .request import Constraint, Delta, GenerationRequest, OverloadedError, Usage
from .service import Service, ServiceOptions

__all__ = ["Answer", "Constraint", "Delta", "GenerationRequest", "OverloadedError", "Service", "ServiceOptions",
           "Usage"]
