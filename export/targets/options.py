"""What TensorRT plans are built for."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import HerdError

PROFILES = ("both", "decode", "prefill")
"""What the decoder's plan is for, which decides how experts are computed (``tensorrt/target.py``)."""


@dataclass(frozen=True)
class PlanOptions:
    """What plans are built for; targets that run graphs take no notice of it.

    Attributes:
        sm: compute capabilities, such as ``("89", "120")``.
        profile: one of ``PROFILES``.
        batch: most sequences decoded together.
        context: most tokens of a sequence, None for the model's own limit, at most 128k.
        allow_fallback: keep plans in which FP8 products became 16-bit ones.
    """

    sm: tuple[str, ...] = ("89", "120")
    profile: str = "both"
    batch: int = 8
    context: int | None = None
    allow_fallback: bool = False

    def __post_init__(self) -> None:
        """Check the profile.

        Raises:
            HerdError: there is none of that name.
        """
        if self.profile not in PROFILES:
            raise HerdError(f"no profile is called {self.profile!r}: choose one of {', '.join(PROFILES)}")
