"""Which of many names fits a picture best: the calf's tower and decoder beside what needs no calf.

    python -m benchmarks.calf_ranking [WORK] [--every 4] [--stamps DIR]

WORK is where ``examples/calf/train.py`` works. Pictures are Twitter's drawings, of which none was trained: of trained
emoji among all trained names, and of emoji of which no vendor's picture was trained among their own names. Asked are

* ``pixels``: the name of the nearest trained view, pixel by pixel;
* ``lite0``: frozen EfficientNet-lite0 and a ridge regression onto the names' MiniLM vectors;
* ``tower, names`` and ``tower, meanings``: the cosines of ``examples/calf/tower.py``, the latter with a reader
  that training leaves behind and no checkpoint has;
* ``calf``: whose name becomes likelier by the picture: log p(name | picture) - log p(name | white), of never shown
  emoji, every n-th picture.

DIR is where the Debian package ``tuxpaint-stamps-default`` (GPL-2, measured only) was unpacked: 100 of its pictures
that are no SVG, many of them photographs, among their 100 captions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from examples.calf.captions import Row, conversation
from examples.calf.config import IMAGE_SIZE
from examples.calf.emoji import chance
from examples.calf.meanings import meanings
from examples.calf.pictures_data import load_named, what_lite0_sees
from examples.calf.tower import Heads, directions, embedded_names, see, token_ids
from herdgraph.model.config import read_config
from herdgraph.model.data.records import record_of
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.processing.pictures import load_image
from herdgraph.model.training.data import IGNORED, Encoder
from herdgraph.model.training.data.packing import Rows
from herdgraph.model.training.runs.start import open_model

from .calf import read_rows
from .screen import show_tables

RIDGE = 0.1
STAMPS = 100
BATCH = 256

Scores = Callable[[Tensor, Sequence[str]], Tensor]
"""Of pictures [n, H, W, 3] and names to how well each fits [n, names]."""


def ranks(scores_nN: Tensor, right_n: Tensor) -> str:
    """Top-1 and top-5."""
    better_n = (scores_nN > scores_nN.gather(1, right_n[:, None])).sum(1)
    return " / ".join(f"{100 * float((better_n < most).float().mean()):.1f} %" for most in (1, 5))


def read_pictures(paths: Sequence[Path]) -> Tensor:
    """Pictures on white, uint8 [n, 64, 64, 3]."""
    small = [load_image(path).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC) for path in paths]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in small]))


class Baselines:
    """What the trained pictures give without a calf.

    Args:
        work: with data and what lite0 sees.
    """

    def __init__(self, work: Path) -> None:
        self.known = load_named(work / "data", work / "lite0.pt")
        self.meanings = meanings(self.known.names)
        self.centre = self.meanings.mean(0)
        seen = functional.normalize(self.known.pooled_nC.float(), dim=-1)
        self.mean = seen.mean(0)
        seen = seen - self.mean
        wanted = (self.meanings - self.centre)[self.known.name_n]
        self.ridge = torch.linalg.solve(seen.T @ seen + RIDGE * len(seen) / 1000 * torch.eye(seen.shape[1]),
                                        seen.T @ wanted)

    def pixels(self, pictures: Tensor, names: Sequence[str]) -> Tensor:
        """Less the distance of the nearest trained view with that name."""
        views, asked = (functional.avg_pool2d(x.permute(0, 3, 1, 2).float() / 255, 2).flatten(1)
                        for x in (self.known.pixels_nHWC, pictures))
        number = {name: index for index, name in enumerate(self.known.names)}
        nearest = torch.full((len(pictures), len(self.known.names)), torch.inf)
        for part, name_n in zip(views.split(4096), self.known.name_n.split(4096), strict=True):
            distances = torch.cdist(asked, part)
            nearest.scatter_reduce_(1, name_n.expand_as(distances), distances, "amin")
        return -nearest[:, [number[name] for name in names]]

    def lite0(self, pictures: Tensor, names: Sequence[str]) -> Tensor:
        """Cosines with the names' vectors."""
        seen = functional.normalize(what_lite0_sees(pictures)[1].float(), dim=-1) - self.mean
        return functional.normalize(seen @ self.ridge, dim=-1) @ directions(meanings(names), self.centre).T


class Tower:
    """The cosines of its training.

    Args:
        model: whose tower.
        work: of its training.
        files: with the tokenizer.
        baselines: know the trained names.
    """

    def __init__(self, model: Llama4, work: Path, files: Path, baselines: Baselines) -> None:
        assert model.config.vision is not None, "the calf sees"
        self.model, self.files, self.centre = model, files, baselines.centre
        self.heads = Heads(model.config.text.hidden_size, model.config.vision.hidden_size)
        self.heads.load_state_dict(torch.load(work / "tower" / "state.pt", weights_only=True)["heads"])
        self.heads.eval()
        self.named = embedded_names(model, token_ids(baselines.known.names, files)).mean(0)
        self.seen = self._seen(baselines.known.pixels_nHWC[::16])[1].mean(0)

    def _seen(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """By place, and the mean of features."""
        parts = (part.permute(0, 3, 1, 2).float() / 127.5 - 1 for part in pictures.split(BATCH))
        places, means = zip(*(see(self.model, part) for part in parts), strict=True)
        return torch.cat(places), torch.cat(means)

    def names(self, pictures: Tensor, names: Sequence[str]) -> Tensor:
        """Cosines with the names' token embeddings."""
        spoken = embedded_names(self.model, token_ids(names, self.files))
        return directions(self._seen(pictures)[1], self.seen) @ directions(spoken, self.named).T

    def meanings(self, pictures: Tensor, names: Sequence[str]) -> Tensor:
        """Cosines with the names' MiniLM vectors."""
        return self.heads.meant(self._seen(pictures)[0]) @ directions(meanings(names), self.centre).T


class Decoder:
    """Which answer a picture makes likelier.

    Args:
        checkpoint: of the calf.
        model: the same.
    """

    def __init__(self, checkpoint: Path, model: Llama4) -> None:
        self.model, self.encoder = model, Encoder(checkpoint, read_config(checkpoint), max_tokens=512)

    def gains(self, pictures: Tensor, answers: Sequence[str]) -> Tensor:
        """Log p(answer | picture) - log p(answer | white)."""
        white = torch.full_like(pictures[:1], 255)
        return self._likelihoods(pictures, answers) - self._likelihoods(white, answers)

    def _likelihoods(self, pictures: Tensor, answers: Sequence[str]) -> Tensor:
        assert self.model.vision is not None, "the calf sees"
        row = [conversation({"image": Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))}, [("What is this?", answer)])
               for answer in answers]
        samples = [self.encoder(record_of(one, key="", origin="", resolve=Path)) for one in row]
        rows = Rows(len(samples), max(map(len, samples)))
        for sample in sorted(samples, key=len, reverse=True):
            rows.place(sample)
        order = sorted(range(len(samples)), key=lambda place: len(samples[place]), reverse=True)
        batch = rows.batch(0)
        found = torch.empty(len(pictures), len(answers))
        for number, picture in enumerate(pictures):
            features = self.model.vision(picture.permute(2, 0, 1)[None].float() / 127.5 - 1)
            logits, _ = self.model.decoder(batch.input_ids_BT, features.repeat(len(answers), 1))
            losses = functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORED,
                                              reduction="none").view(batch.labels_BT.shape)
            found[number, order] = -losses.sum(1)
        return found


def emoji_table(work: Path, every: int, methods: dict[str, Scores], decoder: Decoder) -> Table:
    """Trained and never shown emoji in the drawings of a vendor that was not trained."""
    table = Table(title="top-1 / top-5 of another vendor's drawings")
    columns: dict[str, list[Row]] = {name: read_rows(work / "data" / f"{name}.jsonl")
                                     for name in ("other_vendor", "other_held_out")}
    for title in ("", *(f"{title}, {len(columns[name])} names" for title, name in (
            ("trained emoji", "other_vendor"), ("never shown", "other_held_out")))):
        table.add_column(title)
    for method, scores in methods.items():
        cells = []
        for name, rows in columns.items():
            pictures = read_pictures([work / "data" / row["messages"][0]["content"][0]["image"] for row in rows])
            never = method == "pixels" and name == "other_held_out"
            cells.append("" if never else ranks(scores(pictures, [row["name"] for row in rows]),
                                                torch.arange(len(rows))))
        table.add_row(method, *cells)
    rows = columns["other_held_out"]
    pictures = read_pictures([work / "data" / row["messages"][0]["content"][0]["image"] for row in rows[::every]])
    gains = decoder.gains(pictures, [row["messages"][-1]["content"] for row in rows])
    table.add_row(f"calf, {len(pictures)} pictures", "", ranks(gains, torch.arange(0, len(rows), every)))
    return table


def stamps(directory: Path, methods: dict[str, Scores], decoder: Decoder) -> Table:
    """Pictures of real things among their captions."""
    found = [(path, caption) for path in directory.rglob("*.png") if (caption := _caption(path))]
    found = sorted(found, key=lambda one: chance(one[0].name))
    unique = list({caption: path for path, caption in found}.items())[:STAMPS]
    pictures, captions = read_pictures([path for _, path in unique]), [caption for caption, _ in unique]
    right = torch.arange(len(unique))
    table = Table(title=f"top-1 / top-5 of {STAMPS} stamps of Tux Paint among their captions")
    for column in ("", "top-1 / top-5"):
        table.add_column(column)
    for method in ("lite0", "tower, names", "tower, meanings"):
        table.add_row(method, ranks(methods[method](pictures, captions), right))
    table.add_row("calf", ranks(decoder.gains(pictures, captions), right))
    return table


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    return text.read_text(encoding="utf-8").splitlines()[0].strip() if text.is_file() else ""


@torch.inference_mode()
def main() -> None:
    """Parse the command line, rank, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path(".cache/calf"))
    parser.add_argument("--checkpoint", type=Path, help="default: the calf that was made in WORK")
    parser.add_argument("--every", type=int, default=4, help="ask the decoder about every n-th picture only")
    parser.add_argument("--stamps", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    checkpoint = args.checkpoint or args.work / "calf" / "model"
    torch.set_num_threads(args.threads)
    model = open_model(checkpoint)
    baselines, decoder = Baselines(args.work), Decoder(checkpoint, model)
    # The decoder's embeddings have learned on: the tower is asked as it was when its own training ended.
    aligned = open_model(args.work / "tower" / "model")
    tower = Tower(aligned, args.work, checkpoint, baselines)
    methods = {"pixels": baselines.pixels, "lite0": baselines.lite0, "tower, names": tower.names,
               "tower, meanings": tower.meanings}
    tables = [emoji_table(args.work, args.every, methods, decoder)]
    if args.stamps:
        tables.append(stamps(args.stamps, methods, decoder))
    show_tables(*tables)


if __name__ == "__main__":
    main()
