"""Computes 2 · 3 on every execution provider that onnxruntime lists, and prints a JSON document. Run by ``probe.py``.

    python probe_providers.py MODEL_IN_BASE64

The list is one of what was compiled in: it names CUDA on machines without a GPU, and a session for a provider that
cannot start falls back to the CPU without raising. So the session is asked what it runs on, and for a result.
"""

from __future__ import annotations

import base64
import json
import sys
from typing import Any

_ELSEWHERE = "AzureExecutionProvider"
"""Sends inputs to a server, and computes nothing here."""


def try_provider(onnxruntime: Any, name: str, model: bytes) -> str | None:
    """Why a provider does not work, None when it does."""
    import numpy as np

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[name])
        if session.get_providers()[0] != name:
            return f"does not start, and its session runs on {session.get_providers()[0]} instead"
        (found,) = session.run(None, {"a": np.full((1, 1), 2, np.float32), "b": np.full((1, 1), 3, np.float32)})
    except Exception as error:  # onnxruntime raises its own classes, all of them plain Exceptions
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return None if found.item() == 6 else f"2 x 3 gave {found.item():g}"


def main() -> None:
    """Try all of them."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    if onnxruntime.__dict__.get("preload_dlls") and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls(cudnn=False)
    model = base64.b64decode(sys.argv[1])
    names = [name for name in onnxruntime.get_available_providers() if name != _ELSEWHERE]
    print(json.dumps({"providers": {name: try_provider(onnxruntime, name, model) for name in names}}))


if __name__ == "__main__":
    main()
