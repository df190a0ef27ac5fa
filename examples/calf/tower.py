"""The calf's image tower learns to see, before there is anything to say.

Three things are asked of the picture at once. With f the mean of its features after the projector, n its name among
all N names, w a name's mean token embedding and m its MiniLM vector,

    names       - log softmax_n(cos(f, w) / t)          features end up where the decoder has its words
    meanings    - log softmax_n(cos(A f, m) / t)        names of like things are near: also those that were never shown
    lite0       1 - cos(B h_p, g_p)  and  1 - cos(C f, g)   what EfficientNet-lite0 sees in each place, and altogether

where A, B and C are matrices that only training needs, h_p what the tower gives for a place, g less its mean. Every
step draws new views of the pictures: turned, scaled, moved and tinted. The names are all known, so that each picture is
told from all others at every step, and not only from those of its batch (CLIP, Radford et al. 2021).

A second round, with a cosine of its own, asks for meanings elsewhere: cos(R h, m), h the mean of h_p and R a small
network. f is drawn to the words of trained names, and a matrix finds little else in it: with a hidden layer, what
places give tells more of things that were never shown.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from herdgraph.files import atomic_file
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.processing.tokenizer import load_tokenizer

from . import lite0, meanings
from .pictures_data import NamedPictures

TEMPERATURE = 0.05
PLACES = 4
"""Along each side, of what lite0 sees."""
READER = 1024
"""Width of R's hidden layer."""
SAVE_EVERY = 200


@dataclass(frozen=True)
class TowerOptions:
    """A run.

    Attributes:
        steps: of both rounds.
        batch: pictures of a step.
        learning_rates: the highest of both, after a warm-up over a twentieth; each falls as a cosine to nothing.
        seed: of pictures and views.
    """

    steps: tuple[int, int] = (9000, 3500)
    batch: int = 64
    learning_rates: tuple[float, float] = (1.5e-3, 1e-3)
    seed: int = 0

    def learning_rate(self, step: int) -> float:
        """That of a step."""
        second = step >= self.steps[0]
        length, done = self.steps[second], step - self.steps[0] * second
        warm = max(1, length // 20)
        if done < warm:
            return self.learning_rates[second] * (done + 1) / warm
        return self.learning_rates[second] * (1 + math.cos(math.pi * (done - warm) / max(1, length - warm))) / 2


class Heads(nn.Module):
    """The matrices A, B and C above, and R."""

    def __init__(self, width: int, tower_width: int) -> None:
        super().__init__()
        self.meaning = nn.Linear(width, meanings.WIDTH)
        self.place = nn.Linear(tower_width, lite0.GRID)
        self.pooled = nn.Linear(width, lite0.POOLED)
        self.reader = nn.Sequential(nn.Linear(tower_width, READER), nn.GELU(), nn.Dropout(0.3),
                                    nn.Linear(READER, meanings.WIDTH))

    def meant(self, places_NPC: Tensor) -> Tensor:
        """Unit vectors of what is seen."""
        return functional.normalize(self.reader(places_NPC.mean(1)), dim=-1)


def see(model: Llama4, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """What a tower gives for each of 4 x 4 places [N, 16, C], and the mean of its features [N, D]."""
    assert model.vision is not None, "the calf sees"
    tower = model.vision.vision_model
    x_NPC = tower.embed(pixels_NCHW)
    x_NPC = tower.model(x_NPC, *tower.rotary(len(x_NPC)))
    patches_NPC = tower.layernorm_post(x_NPC)[:, :-1]
    side = math.isqrt(patches_NPC.shape[1])
    places = functional.adaptive_avg_pool2d(patches_NPC.transpose(1, 2).unflatten(-1, (side, side)), PLACES)
    features = model.vision.multi_modal_projector(tower.vision_adapter(patches_NPC))
    return places.flatten(2).transpose(1, 2), features.mean(1)


def view(pixels_NHWC: Tensor, random: torch.Generator) -> Tensor:
    """Views of uint8 pictures, from -1 to 1 [N, 3, H, W]."""
    x = pixels_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
    count = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    angle, scale, move = uniform(-0.08, 0.08), uniform(0.92, 1.08), uniform(-0.06, 0.06, 2, 1)
    turned = torch.stack((torch.stack((angle.cos(), -angle.sin()), -1), torch.stack((angle.sin(), angle.cos()), -1)), 1)
    grid = functional.affine_grid(torch.cat((turned * scale[:, None, None], move), -1), list(x.shape),
                                  align_corners=False)
    x = functional.grid_sample(x, grid, padding_mode="border", align_corners=False)
    x = x * uniform(0.8, 1.15, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
    grey = x.mean(1, keepdim=True)
    return (grey + (x - grey) * uniform(0.6, 1.2, 1, 1, 1)).clamp(-1, 1)


def embedded_names(model: Llama4, ids: Sequence[Sequence[int]]) -> Tensor:
    """The mean token embedding of every name [N, D]."""
    flat = torch.tensor([token for name in ids for token in name])
    starts = torch.tensor([0, *[len(name) for name in ids][:-1]]).cumsum(0)
    return functional.embedding_bag(flat, model.decoder.embed_tokens.weight, starts, mode="mean")


def token_ids(names: Sequence[str], files: Path) -> list[list[int]]:
    """Tokens of names as they stand in an answer, behind an article."""
    tokenizer = load_tokenizer(files)
    return [tokenizer.encode(f" {name}") for name in names]


def directions(x_nD: Tensor, centre_D: Tensor | None = None) -> Tensor:
    """Unit vectors from a centre, the mean if there is none."""
    return functional.normalize(x_nD - (x_nD.mean(0) if centre_D is None else centre_D), dim=-1)


class TowerRun:
    """A tower in training: what a step minimises, and where it stands.

    Args:
        model: of which tower, projector and token embeddings are trained.
        pictures: to learn from.
        files: directory with the tokenizer.
        options: of the run.
    """

    def __init__(self, model: Llama4, pictures: NamedPictures, files: Path, options: TowerOptions) -> None:
        assert model.vision is not None, "the calf sees"
        assert model.config.vision is not None, "the calf sees"
        torch.manual_seed(options.seed)
        self.model, self.pictures, self.options = model, pictures, options
        self.heads = Heads(model.config.text.hidden_size, model.config.vision.hidden_size)
        self.ids = token_ids(pictures.names, files)
        self.meanings = directions(meanings.meanings(pictures.names))
        self.grid_mean, self.pooled_mean = (x.float().mean(0) for x in (pictures.grid_nPC, pictures.pooled_nC))
        trained = [*model.vision.parameters(), *self.heads.parameters(), model.decoder.embed_tokens.weight]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        self.parameters = trained
        self.step = 0
        self.records: list[dict[str, float]] = []

    def losses(self) -> dict[str, Tensor]:
        """The parts of the loss for the pictures of this step."""
        seed = self.options.seed * 1_000_003 + self.step
        random = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)  # of dropout
        chosen = torch.randint(len(self.pictures.name_n), (self.options.batch,), generator=random)
        places, mean = see(self.model, view(self.pictures.pixels_nHWC[chosen], random))
        names, name = directions(embedded_names(self.model, self.ids)), self.pictures.name_n[chosen]
        told = directions(mean) @ names.T / TEMPERATURE
        second = self.step >= self.options.steps[0]
        meant = self.heads.meant(places) if second else functional.normalize(self.heads.meaning(mean), dim=-1)
        grid = functional.normalize(self.pictures.grid_nPC[chosen].float() - self.grid_mean, dim=-1)
        pooled = functional.normalize(self.pictures.pooled_nC[chosen].float() - self.pooled_mean, dim=-1)
        return {
            "names": functional.cross_entropy(told, name),
            "meanings": functional.cross_entropy(meant @ self.meanings.T / TEMPERATURE, name),
            "places": 2 * (1 - functional.cosine_similarity(self.heads.place(places), grid, dim=-1).mean()),
            "lite0": 2 * (1 - functional.cosine_similarity(self.heads.pooled(mean), pooled, dim=-1).mean()),
            "found": (told.argmax(1) == name).float().mean(),
        }

    def advance(self) -> dict[str, float]:
        """One step; the parts of its loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate(self.step)
        parts = self.losses()
        loss = sum((value for name, value in parts.items() if name != "found"), torch.zeros(()))
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"step": self.step, **{name: value.item() for name, value in parts.items()}, "loss": loss.item()}

    def save(self, path: Path) -> None:
        """Keep where the run stands."""
        with atomic_file(path) as temporary:
            torch.save({"model": self.model.state_dict(), "heads": self.heads.state_dict(), "step": self.step,
                        "optimizer": self.optimizer.state_dict(), "records": self.records}, temporary)

    def restore(self, path: Path) -> None:
        """Go on from there."""
        found = torch.load(path, weights_only=True)
        self.model.load_state_dict(found["model"])
        self.heads.load_state_dict(found["heads"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.step, self.records = found["step"], found["records"]


def train_tower(run: TowerRun, directory: Path, on_step: Callable[[int, float], None]) -> None:
    """Train to the last step, from where the run was when it was cut off.

    Args:
        run: at its first step.
        directory: for ``state.pt`` and ``metrics.jsonl``.
        on_step: called after each step, with its number and loss.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = directory / "state.pt"
    if state.is_file():
        run.restore(state)
    started, seconds = time.perf_counter(), run.records[-1]["seconds"] if run.records else 0.0
    last = sum(run.options.steps)
    while run.step < last:
        record = run.advance()
        if run.step % 20 == 0:
            run.records.append({**record, "seconds": seconds + time.perf_counter() - started})
        if run.step % SAVE_EVERY == 0 or run.step == last:
            run.save(state)
        on_step(run.step, record["loss"])
    lines = "\n".join(map(json.dumps, run.records))
    (directory / "metrics.jsonl").write_text(lines + "\n", encoding="utf-8")
