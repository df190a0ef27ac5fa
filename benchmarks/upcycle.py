"""How much of a dense model survives upcycling: KL per token on a page of real English, for both modes.

    python -m benchmarks.upcycle [GGUF] [--experts 4]

The reference is transformers' own Llama, loaded from the same GGUF: it shares no code with us. Compared are the torch
model of the upcycled checkpoint and the CPU bundle built from it. Needs the test dependencies (`make test` installs
them) and the model file that `make demo` fetched.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from herdgraph.console import fail, stderr, table
from herdgraph.export.pipeline import build_bundle
from herdgraph.export.verify import fidelity
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.upcycle import upcycle
from herdgraph.runtimes import Engine

from .peers import let_torchvision_import

TEXT = Path(__file__).parent / "data" / "alice.txt"


def dense_logits(gguf: Path, token_ids: list[int]) -> np.ndarray:
    """Logits of the dense model by transformers, [T, V]."""
    let_torchvision_import()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0].float().numpy()


def perplexity(logits: np.ndarray, token_ids: list[int]) -> float:
    """The exponential of the mean negative log-likelihood of each next token."""
    logprobs = torch.from_numpy(logits[:-1]).double().log_softmax(-1)
    return float(torch.exp(-logprobs[range(len(token_ids) - 1), token_ids[1:]].mean()))


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", type=Path, default=Path(".cache/demo/SmolLM2-135M-Instruct.gguf"))
    parser.add_argument("--experts", type=int, default=4)
    args = parser.parse_args()
    if not args.gguf.is_file():
        fail(f"{args.gguf} does not exist: run `make demo` once, or name a GGUF file")
    reference = token_ids = None
    for mode in ("shared", "split"):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            stderr.print(f"[dim]mode {mode}: upcycling and building[/dim]")
            upcycle(args.gguf, directory / "checkpoint", experts=args.experts, mode=mode, dtype="float32")
            with open_checkpoint(directory / "checkpoint") as checkpoint:
                build_bundle(checkpoint, directory / "bundle")
            engine = Engine.load(directory / "bundle")
            if reference is None or token_ids is None:
                token_ids = engine.processor.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
                reference = dense_logits(args.gguf, token_ids)
            found = engine.prefill(engine.new_sequence(), token_ids, all_positions=True)
        report = fidelity(reference, found)
        table(f"mode {mode}, {args.experts} experts, {len(token_ids)} tokens of {TEXT.name}", {
            "mean KL": f"{report.mean_kl:.3e} nats per token", "largest KL": f"{report.max_kl:.3e}",
            "top-1 agreement": f"{report.top1_agreement:.2%}",
            "largest logit difference": f"{report.max_difference:.2e}",
            "perplexity": f"{perplexity(found, token_ids):.4f} (dense {perplexity(reference, token_ids):.4f})",
        })


if __name__ == "__main__":
    main()
