"""Many requests on one engine: continuous batching, prefix caching, priorities, preemption. Knows nothing of HTTP."""

from .answer import Answer
from .draft_model import DraftModel, drafter_of
from .request import Constraint, Delta, GenerationRequest, OverloadedError, RequestError, Usage
from .service import Service, ServiceOptions
from .speculation import PromptLookup

__all__ = ["Answer", "Constraint", "Delta", "DraftModel", "GenerationRequest", "OverloadedError", "PromptLookup",
           "RequestError", "Service", "ServiceOptions", "Usage", "drafter_of"]
