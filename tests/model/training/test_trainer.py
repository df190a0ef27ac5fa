"""The training loop: falls, resumes to the bit, blames the right layer, and its result builds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.training.data import IGNORED, PADDING, Batch
from herdgraph.model.training.distill import DistillationLoss, Fixed, ModuleTeacher
from herdgraph.model.training.metrics import flops_per_token
from herdgraph.model.training.moe.experts import mixtures
from herdgraph.model.training.objective import Distil, logits_of
from herdgraph.model.training.optim import (
    AveragedWeights,
    OptimizerOptions,
    layer_scale,
    learning_rate_factor,
    optimizer_for,
)
from herdgraph.model.training.runs import (
    DistilOptions,
    LongContextOptions,
    PretrainOptions,
    distil,
    long_context,
    pretrain,
)
from herdgraph.model.training.runs.start import open_model
from herdgraph.model.training.train_options import TrainOptions
from herdgraph.model.training.trainer import Trainer
from herdgraph.runtimes import Engine
from support import herds
from support.small_runs import OPTIMIZER, Fixture, model


def trainer(directory: Path | None = None, *, steps: int = 8, optimizer: OptimizerOptions = OPTIMIZER, **options: Any
            ) -> Trainer:
    return Trainer(model(), Fixture(), TrainOptions(steps=steps, **options), optimizer, directory=directory)


def test_the_loss_falls() -> None:
    losses = trainer(steps=30).fit().losses
    assert losses[0] == pytest.approx(math.log(512), rel=0.1)
    assert losses[-1] < 0.85 * losses[0]


def test_a_run_that_was_cut_off_gives_the_same_losses(tmp_path: Path) -> None:
    optimizer = replace(OPTIMIZER, ema=0.9)
    whole = trainer(optimizer=optimizer)
    wanted = whole.fit().losses
    first = trainer(tmp_path, optimizer=optimizer, save_every=5)
    calls = []

    def stop(progress: Any, _record: Any) -> None:
        calls.append(progress.step)
        if len(calls) == 7:
            raise KeyboardInterrupt

    first.on_step = stop
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = trainer(tmp_path, optimizer=optimizer, save_every=5)
    assert second.fit().losses == wanted
    theirs = whole.state.model.state_dict()
    for name, ours in second.state.model.state_dict().items():
        assert torch.equal(ours, theirs[name]), name
    assert whole.state.average is not None
    assert second.state.average is not None
    averages = dict(whole.state.average.items())
    for name, ours in second.state.average.items():
        assert torch.equal(ours, averages[name]), name
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000005", "step-00000008"]


def test_computing_layers_again_and_cutting_batches_up_change_nothing() -> None:
    wanted = trainer(accumulate=2).fit().losses
    np.testing.assert_allclose(trainer(accumulate=2, recompute=True).fit().losses, wanted, rtol=1e-5)
    wide = Fixture()
    wide.ids = wide.ids.reshape(32, 4, -1)
    joined = Trainer(model(), wide, TrainOptions(steps=8), OPTIMIZER).fit().losses
    np.testing.assert_allclose(joined, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["decoder.layers.2.self_attn.v_proj", "decoder.layers.1.feed_forward.shared_expert.up_proj"])
def test_a_loss_that_is_no_number_names_step_and_layer(name: str) -> None:
    broken = trainer()

    def spoil(progress: Any, _record: Any) -> None:
        if progress.step == 3:
            with torch.no_grad():
                broken.state.model.get_submodule(name).weight[0, 0] = torch.nan

    broken.on_step = spoil
    with pytest.raises(HerdError, match=rf"step 4: the loss is nan; {name} is the first") as caught:
        broken.fit()
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).fit()
    for path in (tmp_path / "checkpoints" / "step-00000002" / "model").glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HerdError, match="cannot be read"):
        trainer(tmp_path, steps=4).fit()


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).fit()
    eight = (True,) * 8
    text = replace(TINY.text, num_layers=8, moe_layers=(), rope_layers=eight, chunked_layers=eight)
    other = Llama4(replace(TINY, vision=None, text=text))
    with pytest.raises(HerdError, match="it is another model's, give another output"):
        Trainer(other, Fixture(), TrainOptions(steps=4), OPTIMIZER, directory=tmp_path).fit()


def test_records(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=6, log_every=2, evaluate_every=3)
    run.held_out = [next(iter(Fixture()))]
    progress = run.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["loss"] == progress.losses[-1]
    named = {"tokens_per_second", "mfu", "gradient_norm", "learning_rate", "load/layers.1.feed_forward",
             "moved/layers.1.feed_forward", "samples/cut", "samples/skipped"}
    assert named <= lines[0].keys()
    assert set(progress.held_out) == {3, 6}
    assert progress.tokens == 6 * 2 * 23


def test_the_bias_acts_less_and_less_until_the_last_step_trains_what_is_served(tmp_path: Path) -> None:
    def biased(directory: Path | None) -> tuple[Trainer, dict[int, float], dict[int, float]]:
        run = trainer(directory, steps=8, save_every=3)
        mixture = next(mixture for _, mixture in mixtures(run.state.model))
        mixture.options = replace(mixture.options, bias_fade=0.5, bias_rate=0.0)
        mixture.selection_bias += torch.tensor([0.0, 9.0, 0.0, 0.0])  # all tokens go to one expert
        acting, moved = {}, {}

        def on_step(progress: Any, record: dict[str, float]) -> None:
            acting[progress.step], moved[progress.step] = mixture.acting, record["moved/layers.1.feed_forward"]
            if directory is not None and progress.step == 7 and len(acting) == 7:
                raise KeyboardInterrupt

        run.on_step = on_step
        return run, acting, moved

    run, acting, moved = biased(None)
    wanted = run.fit().losses
    assert list(acting.values()) == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert moved[1] > 0.5
    assert moved[8] == 0
    mixture = next(mixture for _, mixture in mixtures(run.state.model))
    logits_TE = torch.randn(50, 4)
    assert torch.equal(mixture.train().choose(logits_TE), mixture.eval().choose(logits_TE))
    with pytest.raises(KeyboardInterrupt):
        biased(tmp_path)[0].fit()
    run, acting, _ = biased(tmp_path)
    assert run.fit().losses == wanted
    assert acting == {7: 0.25, 8: 0}


class Nothing(Fixture):
    """Batches without a labelled token; ``padded`` ones have no token at all."""

    padded = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            document = torch.full_like(batch.document_BT, PADDING if self.padded else 0)
            yield Batch(batch.input_ids_BT, torch.full_like(batch.labels_BT, IGNORED), document, None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("objective", ["tokens", "distil"])
def test_batches_with_nothing_to_learn_do_no_harm(padded: bool, objective: str, tmp_path: Path) -> None:
    data = Nothing()
    data.padded = padded
    distilled = Distil(ModuleTeacher(model(7), logits_of), DistillationLoss())
    run = Trainer(model(), data, TrainOptions(steps=3, log_every=1), OPTIMIZER, held_out=[next(iter(data))],
                  objective=None if objective == "tokens" else distilled, directory=tmp_path)
    progress = run.fit()
    assert progress.losses == [0, 0, 0]
    assert progress.held_out[3] == 0
    assert all(torch.isfinite(tensor).all() for tensor in run.state.model.state_dict().values())
    for state in run.state.optimizer.state.values():
        assert not state["exp_avg"].any(), "nothing was learned"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    after = Trainer(run.state.model, Fixture(), TrainOptions(steps=3), OPTIMIZER).fit().losses
    assert all(map(math.isfinite, after))


def test_impossible_runs_are_refused() -> None:
    for name in ("accumulate", "log_every"):
        with pytest.raises(HerdError, match=f"{name} is 0, it must be at least 1"):
            TrainOptions(**{name: 0})


def test_schedules() -> None:
    for schedule in ("cosine", "wsd", "constant"):
        options = OptimizerOptions(warmup=10, schedule=schedule, final=0.1, decay=0.2)  # type: ignore[arg-type]
        factors = [learning_rate_factor(step, 100, options) for step in range(101)]
        assert factors[0] == 0.1
        assert factors[9] == factors[10] == 1.0
        assert factors[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        assert all(a >= b for a, b in pairwise(factors[10:]))
    assert learning_rate_factor(79, 100, OptimizerOptions(warmup=10, schedule="wsd", decay=0.2)) == 1.0


def test_groups_of_the_optimiser() -> None:
    prepared = model()
    optimizer = optimizer_for(prepared, OptimizerOptions(base_width=32))
    names = {id(parameter): name for name, parameter in prepared.named_parameters()}
    seen = {names[id(parameter)]: (group["scale"], group["weight_decay"]) for group in optimizer.param_groups
            for parameter in group["params"]}
    assert seen.keys() == set(names.values())
    for name in ("layers.0.self_attn.q_proj.weight", "layers.1.feed_forward.experts.down_proj", "lm_head.weight",
                 "layers.1.feed_forward.router.weight"):
        assert seen[f"decoder.{name}"] == (0.5, 0.2), "what decays in a step stays the same"
    for name in ("embed_tokens.weight", "norm.weight", "layers.0.input_layernorm.weight"):
        assert seen[f"decoder.{name}"] == (1.0, 0.0)


def test_rates_by_layer() -> None:
    """Of a decoder 64 wide by the rate of one 16 wide, and of an image tower 32 wide; and of all alike."""
    tied = replace(TINY.text, tie_word_embeddings=True)
    matrix, norm = torch.zeros(4, 128), torch.zeros(64)
    assert layer_scale("decoder.layers.0.feed_forward.down_proj.weight", matrix, TINY.text, 16) == 0.25
    assert layer_scale("decoder.layers.0.feed_forward.down_proj.weight", matrix, TINY.text, 128) == 2.0
    assert layer_scale("decoder.norm.weight", norm, tied, 16) == 0.25, "it scales the logits of a tied head"
    assert layer_scale("decoder.layers.0.input_layernorm.weight", norm, tied, 16) == 1.0
    assert layer_scale("vision.multi_modal_projector.linear_1.weight", matrix, TINY.text, 64) == 0.5
    assert layer_scale("vision.multi_modal_projector.linear_1.weight", matrix, TINY.text, 256) == 1.0
    assert layer_scale("vision.vision_model.positional_embedding_vlm", matrix, TINY.text, 16) == 1.0
    assert layer_scale("decoder.lm_head.weight", matrix, TINY.text, None) == 1.0


def test_averaged_weights_follow_slowly() -> None:
    layer = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(layer.weight)
    average = AveragedWeights(layer, 0.5)
    torch.nn.init.ones_(layer.weight)
    average.update(layer)
    assert torch.allclose(dict(average.items())["weight"], torch.full((2, 2), 0.9)), "the first steps count more"
    for _ in range(40):
        average.update(layer)
    assert torch.allclose(dict(average.items())["weight"], torch.ones(2, 2), atol=1e-4)


def test_operations_per_token_follow_the_active_parameters() -> None:
    one, many = (flops_per_token(replace(TINY, vision=None, text=replace(TINY.text, num_experts=count)), 64)
                 for count in (1, 16))
    router = 2 * 15 * TINY.text.hidden_size * 6
    assert many - one == router, "experts that are not chosen cost nothing"


def test_distilling_moves_a_student_to_its_teacher() -> None:
    teacher = model(7)
    with torch.no_grad():
        teacher.decoder.lm_head.weight *= 8  # an opinion to learn
    objective = Distil(ModuleTeacher(teacher, logits_of), DistillationLoss(weighting=Fixed(1.0)))
    student = model()
    with torch.no_grad():
        for own, other in zip(student.parameters(), teacher.parameters(), strict=True):
            own.copy_(other + 0.02 * torch.randn_like(other))
    losses = Trainer(student, Fixture(count=1), TrainOptions(steps=20), replace(OPTIMIZER, weight_decay=0),
                     objective=objective).fit().losses
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with tokenizer, and data with text and a picture."""
    from PIL import Image

    directory = tmp_path_factory.mktemp("recipes")
    herds.save(TINY, directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    Image.new("RGB", (28, 28), "green").save(directory / "green.png")
    rows = [{"text": f"The herd of {number} grazes on the green hill. " * 2} for number in range(30)]
    rows += [{"text": "<|image|>a green hill", "images": ["green.png"]} for _ in range(6)]
    (directory / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return directory / "checkpoint", directory / "data.jsonl"


def common(files: tuple[Path, Path], output: Path, **train: Any) -> dict[str, Any]:
    return {"checkpoint": files[0], "data": (files[1],), "output": output, "rows": 2, "seq_len": 128, "held_out": 0.1,
            "train": TrainOptions(**{"steps": 4, **train}), "optimizer": OPTIMIZER}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_what_pretraining_gives_goes_straight_into_build(
    files: tuple[Path, Path], tmp_path: Path, precision: str
) -> None:
    progress = pretrain(PretrainOptions(**common(files, tmp_path / "run", precision=precision)))
    assert progress.step == 4
    assert 4 in progress.held_out
    with open_checkpoint(tmp_path / "run" / "model") as checkpoint:
        build_bundle(checkpoint, tmp_path / "bundle")
    engine = Engine.load(tmp_path / "bundle")
    ids = herds.tokens(20)
    found = engine.prefill(engine.new_sequence(), ids, all_positions=True)
    with torch.inference_mode():
        wanted = open_model(tmp_path / "run" / "model").eval()(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    with open_checkpoint(files[0]) as before:
        assert not torch.equal(Llama4.from_checkpoint(before).decoder.norm.weight.bfloat16(),
                               open_model(tmp_path / "run" / "model").decoder.norm.weight.bfloat16())


def test_averaged_weights_are_what_is_written(files: tuple[Path, Path], tmp_path: Path) -> None:
    for name, decay in (("last", 0.0), ("average", 0.9)):
        options = common(files, tmp_path / name)
        pretrain(PretrainOptions(**{**options, "optimizer": replace(OPTIMIZER, ema=decay)}))
    last, average = (open_model(tmp_path / name / "model").decoder.norm.weight for name in ("last", "average"))
    assert not torch.equal(last, average)


@pytest.mark.parametrize("weighting", ["dynamic", "schedule", "fixed"])
def test_every_weighting_distils_from_a_checkpoint(files: tuple[Path, Path], tmp_path: Path, weighting: str) -> None:
    options = DistilOptions(**common(files, tmp_path / "run"), teacher=files[0], fresh=True, weighting=weighting)  # type: ignore[arg-type]
    assert distil(options).step == 4


def test_distilling_without_teacher_or_with_another_tokenizer_is_refused(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(HerdError, match="needs a teacher"):
        distil(DistilOptions(**common(files, tmp_path / "run")))
    herds.save(TINY, tmp_path / "other")
    herds.write_processor(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["<|reserved_510|>x"] = tokenizer["model"]["vocab"].pop("<|reserved_510|>", 510)
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(HerdError, match="tokenizer"):
        distil(DistilOptions(**common(files, tmp_path / "run"), teacher=tmp_path / "other"))


def test_a_longer_context(files: tuple[Path, Path], tmp_path: Path) -> None:
    long_context(LongContextOptions(**common(files, tmp_path / "run", steps=2), context=8192, rope_factor=2.0))
    config = open_model(tmp_path / "run" / "model").config.text
    assert config.max_position_embeddings == 8192
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 2.0
    with pytest.raises(HerdError, match="the context is 4096 already, 4096 is not more"):
        long_context(LongContextOptions(**common(files, tmp_path / "no"), context=4096))


def test_no_data_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="no data was given"):
        pretrain(PretrainOptions(**{**common(files, tmp_path / "run"), "data": ()}))
