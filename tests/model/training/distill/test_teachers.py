"""Teachers give equal targets wherever they run, and a cache gives back what was kept or says why it cannot."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.data.packing import IGNORED, PADDING, Batch
from herdgraph.model.training.distill import (
    CachedTeacher,
    CacheSpec,
    CacheWriter,
    DenseTargets,
    DistillationLoss,
    EngineTeacher,
    ModuleTeacher,
    TargetCache,
    TopK,
    TopKTargets,
    documents,
    keep_targets,
    require_tokenizer,
    tokenizer_hash,
)
from herdgraph.model.training.objective import logits_of
from herdgraph.runtimes import Engine
from support import herds

V, PATCH = TINY.text.vocab_size, TINY.image_token_id
PER_TILE = TINY.vision.tokens_per_tile
HASH = "a" * 64
SPEC = CacheSpec(tokenizer=HASH, vocabulary=V, k=8)


def _document(length: int, seed: int, tiles: int = 0, prompt: int = 2) -> tuple[list[int], list[int]]:
    """Ids, with image tokens after the first, and labels, none inside of the prompt."""
    ids = herds.tokens(length, seed)
    ids[1 : 1 + tiles * PER_TILE] = [PATCH] * (tiles * PER_TILE)
    labels = [*ids[1:], IGNORED]
    learned = max(prompt, 1 + tiles * PER_TILE)
    return ids, [IGNORED] * (learned - 1) + labels[learned - 1 :]


def _pack(rows: list[list[tuple[list[int], list[int]]]], length: int, tiles: int = 0, seed: int = 0) -> Batch:
    ids, labels = (torch.full((len(rows), length), fill) for fill in (0, IGNORED))
    numbers = torch.full((len(rows), length), PADDING)
    for row, packed in enumerate(rows):
        start = 0
        for number, (own_ids, own_labels) in enumerate(packed):
            end = start + len(own_ids)
            ids[row, start:end], labels[row, start:end] = torch.tensor(own_ids), torch.tensor(own_labels)
            numbers[row, start:end] = number
            start = end
    size = TINY.vision.image_size
    pixels = torch.randn(tiles, 3, size, size, generator=torch.Generator().manual_seed(seed)) if tiles else None
    return Batch(ids, labels, numbers, pixels)


A, B, C = _document(9, 1), _document(12, 2, tiles=1), _document(6, 3)
MIXED = _pack([[A, B], [C]], 24, tiles=1)
TEXT = _pack([[A, C], [_document(20, 4)]], 24)


def _random_teacher(batch: Batch, seed: int = 0) -> DenseTargets:
    generator = torch.Generator().manual_seed(seed)
    return DenseTargets(3 * torch.randn(batch.input_ids_BT.numel(), V, generator=generator))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teachers") / "checkpoint"
    herds.save(TINY, directory)
    herds.write_processor(directory)
    return directory


@pytest.fixture(scope="module")
def module(checkpoint: Path) -> Llama4:
    with open_checkpoint(checkpoint) as source:
        return Llama4.from_checkpoint(source)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Engine:
    with open_checkpoint(checkpoint) as source:
        build_bundle(source, checkpoint.parent / "bundle")
    return Engine.load(checkpoint.parent / "bundle", threads=1)


# -- documents -------------------------------------------------------------------------------------------------------


def test_documents_have_their_own_tokens_and_tiles() -> None:
    found = list(documents(MIXED, TINY))
    assert [document.start for document in found] == [0, 9, 24]
    assert [document.ids_L.tolist() for document in found] == [A[0], B[0], C[0]]
    assert [None if d.tiles_PCHW is None else len(d.tiles_PCHW) for d in found] == [None, 1, None]
    for document, (_, labels) in zip(found, (A, B, C), strict=True):
        assert document.learned.tolist() == [at for at, label in enumerate(labels) if label != IGNORED]


def test_documents_without_labels_are_left_out_and_their_tiles_passed_over() -> None:
    silent = (B[0], [IGNORED] * len(B[0]))
    batch = _pack([[silent, B]], 24, tiles=2)
    (found,) = documents(batch, TINY)
    assert found.start == 12
    assert torch.equal(found.tiles_PCHW, batch.pixels_NCHW[1:])


@pytest.mark.parametrize("tiles", [0, 2])
def test_tiles_that_do_not_match_the_image_tokens_are_refused(tiles: int) -> None:
    batch = _pack([[A, B], [C]], 24, tiles=tiles)
    with pytest.raises(HerdError, match=f"the batch has {tiles} tiles, its image tokens stand for 1"):
        list(documents(batch, TINY))


def test_keys_depend_on_tokens_labels_and_pictures_only() -> None:
    first = list(documents(MIXED, TINY))
    again = {d.key: d for d in documents(_pack([[C], [B, A]], 30, tiles=1), TINY)}
    for document in first:
        twin = again[document.key]
        assert (twin.labels_key, twin.tiles_key) == (document.labels_key, document.tiles_key)
    other = list(documents(_pack([[A, B]], 24, tiles=1, seed=1), TINY))
    assert other[1].key == first[1].key
    assert other[1].tiles_key != first[1].tiles_key
    assert len({document.key for document in first}) == 3


# -- modules and engines ---------------------------------------------------------------------------------------------


def test_a_module_teacher_answers_as_it_is_served_and_is_left_as_it_was(module: Llama4) -> None:
    teacher, served = ModuleTeacher(module, logits_of), logits_of(module.eval(), MIXED).detach().flatten(0, 1)
    for training in (True, False):
        module.train(training)
        targets = teacher.targets(MIXED)
        assert module.training == training
        assert isinstance(targets, DenseTargets)
        assert not targets.logits_NV.requires_grad
        assert torch.equal(targets.logits_NV, served)


@pytest.mark.parametrize("batch", [TEXT, MIXED], ids=["text", "mixed"])
def test_an_engine_teacher_equals_the_module(batch: Batch, module: Llama4, engine: Engine) -> None:
    theirs, ours = EngineTeacher(engine).targets(batch), ModuleTeacher(module, logits_of).targets(batch)
    learned = (batch.labels_BT != IGNORED).flatten()
    torch.testing.assert_close(theirs.logits_NV[learned], ours.logits_NV[learned], rtol=1e-4, atol=1e-4)


def test_losses_with_both_are_equal(module: Llama4, engine: Engine) -> None:
    student = torch.randn(*MIXED.labels_BT.shape, V)
    loss = DistillationLoss(temperature=2.0)
    found = [loss(student, teacher.targets(MIXED), MIXED.labels_BT)[0]
             for teacher in (EngineTeacher(engine), ModuleTeacher(module, logits_of))]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_an_engine_of_another_vocabulary_is_refused(engine: Engine) -> None:
    batch = replace(TEXT, input_ids_BT=TEXT.input_ids_BT + V)
    with pytest.raises(HerdError, match="outside of the vocabulary"):
        EngineTeacher(engine).targets(batch)


# -- cache: round trip -----------------------------------------------------------------------------------------------


def _kept(directory: Path, spec: CacheSpec = SPEC, batches: tuple[Batch, ...] = (MIXED,)) -> DenseTargets:
    with CacheWriter(directory, spec, TINY) as writer:
        for batch in batches:
            writer.add(batch, _random_teacher(batch))
    return _random_teacher(batches[0])


def _cached(directory: Path) -> CachedTeacher:
    return CachedTeacher(TargetCache(directory, tokenizer=HASH), TINY)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_was_kept_comes_back(temperature: float, tmp_path: Path) -> None:
    spec = replace(SPEC, temperature=temperature)
    dense = _kept(tmp_path, spec)
    targets = _cached(tmp_path).targets(MIXED)
    assert isinstance(targets, TopKTargets)
    assert len(targets) == MIXED.labels_BT.numel()
    learned = (MIXED.labels_BT != IGNORED).flatten().nonzero()[:, 0]
    expected = spec.sparsifier(dense.logits_NV[learned], MIXED.labels_BT.flatten()[learned])
    found = targets.rows(learned)
    assert torch.equal(found.ids_NK, expected.ids_NK)
    torch.testing.assert_close(found.logprobs_NK, expected.logprobs_NK.bfloat16())
    for name in ("tail_N", "logsumexp_N", "label_logprob_N", "entropy_N"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)


def test_rounded_log_probabilities_still_sum_to_one(tmp_path: Path) -> None:
    _kept(tmp_path)
    learned = (MIXED.labels_BT != IGNORED).flatten()
    logp, _ = _cached(tmp_path).targets(MIXED).pair(torch.zeros(48, V), 1.0)
    torch.testing.assert_close(logp[learned].exp().sum(-1), torch.ones(int(learned.sum())))


def test_a_cached_teacher_of_all_ids_trains_as_the_teacher_itself(tmp_path: Path) -> None:
    dense = _kept(tmp_path, replace(SPEC, k=V, temperature=2.0))
    student = torch.randn(*MIXED.labels_BT.shape, V, requires_grad=True)
    loss = DistillationLoss(temperature=2.0)
    values = [loss(student, targets, MIXED.labels_BT)[0] for targets in (dense, _cached(tmp_path).targets(MIXED))]
    torch.testing.assert_close(*values, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in values), rtol=0.05, atol=1e-4)


def test_packing_order_and_batch_size_do_not_matter(tmp_path: Path) -> None:
    """Attention stays inside of documents, so their targets do not depend on neighbours."""
    _kept(tmp_path)
    teacher, other = _cached(tmp_path), _pack([[C], [B, A]], 40, tiles=1)
    starts = {d.key: d.start for d in documents(MIXED, TINY)}
    before, after = teacher.targets(MIXED), teacher.targets(other)
    for document in documents(other, TINY):
        rows = document.learned
        assert torch.equal(after.ids_NK[document.start + rows], before.ids_NK[starts[document.key] + rows])


def test_a_batch_without_labels(tmp_path: Path) -> None:
    _kept(tmp_path)
    silent = replace(TEXT, labels_BT=torch.full_like(TEXT.labels_BT, IGNORED))
    targets = _cached(tmp_path).targets(silent)
    assert len(targets) == TEXT.labels_BT.numel()
    assert DistillationLoss()(torch.zeros(2, 24, V), targets, silent.labels_BT)[0].item() == 0


@pytest.mark.parametrize("k", [8, 64])
def test_bytes_per_token(k: int, tmp_path: Path) -> None:
    spec = replace(SPEC, k=k)
    long = _pack([[_document(2000, 5, prompt=1)]], 2000)
    with CacheWriter(tmp_path, spec, TINY) as writer:
        writer.add(long, _random_teacher(long))
    assert writer.bytes_per_token == pytest.approx(spec.bytes_per_token, abs=2)
    cache = TargetCache(tmp_path, tokenizer=HASH)
    assert cache.bytes_per_token == writer.bytes_per_token
    assert (len(cache), cache.tokens) == (1, 1999)


def test_the_bytes_of_the_specification() -> None:
    assert CacheSpec(tokenizer=HASH, vocabulary=202048).bytes_per_token == 64 * (4 + 2) + 16


# -- cache: writing on -----------------------------------------------------------------------------------------------


def test_shards_are_written_as_targets_come(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, SPEC, TINY, shard_bytes=1) as writer:
        for number, batch in enumerate((MIXED, TEXT)):
            writer.add(batch, _random_teacher(batch))
            assert len(json.loads((tmp_path / "index.json").read_text())["shards"]) == number + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json", "targets-00000.safetensors", "targets-00001.safetensors"]
    assert len(TargetCache(tmp_path, tokenizer=HASH)) == 4  # two of the documents are in both batches


def test_a_writer_goes_on_where_another_stopped_without_asking_the_teacher_again(tmp_path: Path) -> None:
    _kept(tmp_path)
    asked: list[Batch] = []

    def targets_of(batch: Batch) -> DenseTargets:
        asked.append(batch)
        return _random_teacher(batch, seed=9)

    before = _cached(tmp_path).targets(MIXED)
    with CacheWriter(tmp_path, SPEC, TINY) as writer:
        keep_targets(writer, targets_of, [MIXED, TEXT, TEXT])
    assert asked == [TEXT]
    teacher = _cached(tmp_path)
    assert torch.equal(teacher.targets(MIXED).ids_NK, before.ids_NK)
    teacher.targets(TEXT)


def test_an_interruption_keeps_what_was_computed(tmp_path: Path) -> None:
    def stopped() -> Iterator[Batch]:
        yield MIXED
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), CacheWriter(tmp_path, SPEC, TINY) as writer:
        keep_targets(writer, _random_teacher, stopped())
    _cached(tmp_path).targets(MIXED)


def test_shards_have_the_mode_of_other_files(tmp_path: Path) -> None:
    _kept(tmp_path)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_what_a_killed_writer_left_is_written_over(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, SPEC, TINY):
        pass
    gone = 1 << 22  # above every process id
    left = [f".{name}.{gone}.partial" for name in ("targets-00000.safetensors", "index.json")]
    for name in ("targets-00000.safetensors", *left):
        (tmp_path / name).write_bytes(b"half")
    _kept(tmp_path)
    _cached(tmp_path).targets(MIXED)
    assert not any((tmp_path / name).exists() for name in left)


def test_a_full_disk_is_told_and_whole_shards_stay(tmp_path: Path) -> None:
    _kept(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)  # the kernel refuses to let a file grow beyond it
    long = _pack([[_document(400, 7)]], 400)
    writer = CacheWriter(tmp_path, SPEC, TINY, shard_bytes=1)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(HerdError, match=r"failed: .*1 complete shards are kept: make room and run again") as caught:
            writer.add(long, _random_teacher(long))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    _cached(tmp_path).targets(MIXED)
    with CacheWriter(tmp_path, SPEC, TINY) as writer:
        writer.add(long, _random_teacher(long))
    _cached(tmp_path).targets(long)


def test_an_index_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _kept(tmp_path)
    before = (tmp_path / "index.json").read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CacheWriter, "_write_index", full)
    with pytest.raises(HerdError, match="No space left on device; 1 complete shards are kept"):
        _kept(tmp_path, batches=(TEXT,))
    assert (tmp_path / "index.json").read_text() == before
    monkeypatch.undo()
    _kept(tmp_path, batches=(TEXT,))
    _cached(tmp_path).targets(TEXT)


# -- cache: refusals -------------------------------------------------------------------------------------------------


def _refused(message: str, directory: Path, batch: Batch = MIXED, tokenizer: str = HASH) -> None:
    with pytest.raises(HerdError, match=message) as caught:
        CachedTeacher(TargetCache(directory, tokenizer=tokenizer), TINY).targets(batch)
    assert "\n" not in str(caught.value)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    message = "uses tokenizer aaaaaaaaaaaa, the student bbbbbbbbbbbb: its ids mean other text"
    _refused(message, tmp_path, tokenizer="b" * 64)


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    config = replace(TINY, text=replace(TINY.text, vocab_size=V + 1))
    with pytest.raises(HerdError, match=f"a teacher with {V} ids, the student has {V + 1}"):
        CachedTeacher(TargetCache(tmp_path, tokenizer=HASH), config)


def test_a_missing_or_differently_cut_document_is_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    cut = tuple(part[:7] for part in A)
    for batch in (TEXT, _pack([[cut]], 24)):
        _refused("is not among the 3 of .*: it is new or was cut elsewhere", tmp_path, batch)


def test_another_loss_mask_is_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    _refused("had another loss mask", tmp_path, _pack([[_document(9, 1, prompt=4)]], 24))


def test_one_caption_of_two_pictures_is_two_documents(tmp_path: Path) -> None:
    pictures = [_pack([[B]], 24, tiles=1, seed=seed) for seed in (0, 1)]
    teachers = {batch: _random_teacher(batch, seed) for seed, batch in enumerate(pictures)}
    with CacheWriter(tmp_path, SPEC, TINY) as writer:
        keep_targets(writer, teachers.__getitem__, [*pictures, pictures[0]])
    cache = TargetCache(tmp_path, tokenizer=HASH)
    assert len(cache) == 2
    for batch, dense in teachers.items():
        (document,) = documents(batch, TINY)
        best = dense.logits_NV[document.start + document.learned].argmax(-1)
        assert torch.equal(cache.read(document).ids_NK[:, 0], best.int())


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    _refused("had other pictures", tmp_path, _pack([[A, B]], 24, tiles=1, seed=1))


def test_another_temperature_is_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    with pytest.raises(HerdError, match=r"kept at temperature 1\.0, the loss uses 2\.0"):
        DistillationLoss(temperature=2.0)(torch.zeros(2, 24, V), _cached(tmp_path).targets(MIXED), MIXED.labels_BT)


SHARD = "targets-00000.safetensors"


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_altered_shards_are_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    _flip(tmp_path / SHARD, -1)
    _refused("is damaged, its SHA-256 is not the one in index.json", tmp_path)


def test_a_swapped_but_valid_shard_is_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    tensors = load_file(tmp_path / SHARD)
    tensors["ids"] = tensors["ids"].flip(1).contiguous()
    save_file(tensors, tmp_path / SHARD)
    _refused("is damaged, its SHA-256", tmp_path)


def test_cut_missing_and_scrambled_shards_are_refused(tmp_path: Path) -> None:
    _kept(tmp_path)
    whole = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(whole[:-5])
    _refused(f"has {len(whole) - 5} bytes, {len(whole)} were written", tmp_path)
    (tmp_path / SHARD).write_bytes(b"\xff" * len(whole))
    _refused("is damaged or cut off", tmp_path)
    (tmp_path / SHARD).unlink()
    _refused("is missing: restore it, or make the cache again", tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    (lambda index: index.pop("spec"), "is damaged"),
    (lambda index: index["spec"].update(surprise=1), "is damaged"),
    (lambda index: index["shards"][0].pop("bytes"), "is damaged"),
    (lambda index: index.update(shards=[3]), "is damaged"),
    (lambda index: index.update(format=7), "a cache of format 7, this version reads 2"),
    (lambda index: index["shards"][0].update(file="../other.safetensors"), "leaves the cache"),
])
def test_a_damaged_index_is_refused(change: object, message: str, tmp_path: Path) -> None:
    _kept(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    change(index)
    (tmp_path / "index.json").write_text(json.dumps(index))
    _refused(message, tmp_path)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    _refused("has no index.json", tmp_path / "nothing")
    (tmp_path / "index.json").write_text("{")
    _refused("cannot be read as JSON", tmp_path)


def test_writers_refuse_other_caches_and_other_directories(tmp_path: Path) -> None:
    _kept(tmp_path / "cache")
    for change, message in ((replace(SPEC, k=9), "with k 8, 9 is wanted"),
                            (replace(SPEC, tokenizer="b" * 64), "with tokenizer aaa")):
        with pytest.raises(HerdError, match=message):
            CacheWriter(tmp_path / "cache", change, TINY)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    for path in ("other", "other/mine.txt"):
        with pytest.raises(HerdError, match=r"is not empty|cannot write"):
            CacheWriter(tmp_path / path, SPEC, TINY)
    assert (tmp_path / "other" / "mine.txt").exists()


def test_writers_refuse_targets_that_are_not_all_logits(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, SPEC, TINY) as writer:
        sparse = TopK(k=3)(_random_teacher(MIXED).logits_NV, torch.zeros(48, dtype=torch.int64))
        with pytest.raises(HerdError, match="made from all logits"):
            writer.add(MIXED, sparse)
        with pytest.raises(HerdError, match=f"the teacher knows 7 ids, the student {V}"):
            writer.add(MIXED, DenseTargets(torch.zeros(48, 7)))


def test_impossible_caches_are_refused() -> None:
    with pytest.raises(HerdError, match="best ids cannot be kept"):
        replace(SPEC, k=V + 1)


# -- tokenizers ------------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_known_by_what_its_ids_mean(checkpoint: Path, engine: Engine, tmp_path: Path) -> None:
    own = tokenizer_hash(checkpoint)
    assert tokenizer_hash(engine.bundle.processor) == own
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "truncation": None, "padding": None}, indent=3))
    assert tokenizer_hash(tmp_path) == own
    content["model"]["vocab"]["<|reserved_300|>x"] = content["model"]["vocab"].pop("<|reserved_300|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer_hash(tmp_path) != own
    with pytest.raises(HerdError, match="the teacher uses tokenizer"):
        require_tokenizer(tokenizer_hash(tmp_path), own)


def test_metas_tokenizer_is_known_by_its_bytes(tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"has no tokenizer\.json or tokenizer\.model"):
        tokenizer_hash(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(np.arange(9, dtype=np.uint8).tobytes())
    assert len(tokenizer_hash(tmp_path)) == 64
