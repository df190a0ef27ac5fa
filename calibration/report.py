"""The report of a calibration: one HTML file that holds its pictures, made from ``calibration.json`` alone."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from . import plots

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .8rem 0; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; }
td + td { font-variant-numeric: tabular-nums; } th { border-bottom: 1px solid #bbb; } img { max-width: 100%; }
.warn { color: #b03a2e; } .dim { color: #777; } h2 { margin-top: 2.2rem; }
"""


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Write the report of a calibration's description."""
    sections = [_summary(found), _coverage(found), _quality(found), _layers(found), _inputs(found)]
    title = f"Calibration of {found['checkpoint']}"
    path.write_text(
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style>"
        f"<h1>{escape(title)}</h1>{''.join(sections)}</html>\n", encoding="utf-8",
    )


def _summary(found: dict[str, Any]) -> str:
    data, quality = found["data"], found["quality"]
    rows = {
        "recipe": f"{found['recipe']}, observer {found['observer']}",
        "kept in high precision": ", ".join(found["kept"]) or "nothing beyond the recipe",
        "data": f"{data['tokens']} tokens in {data['windows']} windows, {data['tiles']} image tiles; SHA-256 "
                f"{data['sha256'][:16]}…",
        "checkpoint": f"{found['checkpoint']}, fingerprint {found['fingerprint'][:16]}…",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    if quality:
        rows["against float32"] = (f"KL {quality['mean_kl']:.2e} per token, same top token {quality['top1']:.1%}, "
                                   f"perplexity {quality['perplexity']:.3f} ({quality['change']:+.2%})")
    return _table(["", ""], rows.items())


def _coverage(found: dict[str, Any]) -> str:
    own = found["coverage"]["own"]
    if not own:
        return ""
    layers = sorted(own, key=int)
    counts = np.array([own[layer] for layer in layers])
    shown = np.array([found["coverage"]["shown"][layer] for layer in layers])
    text = (f"The router sent every expert between {counts.min()} and {counts.max()} tokens. Experts below "
            f"{found['coverage']['least']} were shown the tokens closest to being sent to them: "
            f"{int((shown > 0).sum())} of {counts.size}.")
    dead = found["coverage"]["dead"]
    if dead:
        names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in dead[:40])
        text += f"</p><p class='warn'>No token of its own: {names}{' …' if len(dead) > 40 else ''}."
    picture = plots.heat_map(counts, title="Tokens that the router sent", x="expert", y="layer", labels=layers,
                             note="tokens (red: none)")
    return f"<h2>Experts</h2><p>{text}</p>{_image(picture)}"


def _quality(found: dict[str, Any]) -> str:
    quality = found["quality"]
    if not quality:
        return "<h2>Quality</h2><p class='dim'>Not judged: no data was held out, or nothing is stored in FP8.</p>"
    names = {**{f"kept: {name}": row for name, row in quality["tried"].items()}, "chosen": quality}
    rows = [(name, f"{row['mean_kl']:.2e}", f"{row['top1']:.1%}", f"{row['perplexity']:.3f}", f"{row['change']:+.2%}")
            for name, row in names.items()]
    return (f"<h2>Quality</h2><p>{quality['tokens']} tokens that no scale was fitted on; float32 has perplexity "
            f"{quality['exact_perplexity']:.3f}.</p>"
            + _table(["", "mean KL", "same top token", "perplexity", "change"], rows))


def _layers(found: dict[str, Any]) -> str:
    quality = found["quality"]
    if not quality:
        return ""
    attention, feed_forward = zip(*quality["layer_errors"], strict=True)
    picture = plots.lines({"attention": list(attention), "feed-forward": list(feed_forward)},
                          title="Error of each layer's own update, on exact inputs", x="layer", y="relative error")
    rows = [(layer, f"{max(quality['layer_errors'][int(layer)]):.2%}", f"{row['mean_kl']:.2e}",
             f"{row['mean_kl'] - quality['mean_kl']:+.1e}") for layer, row in quality["with_layer_kept"].items()]
    return (f"<h2>Layers</h2>{_image(picture)}<p>What keeping one of the worst layers in high precision would win:</p>"
            + _table(["layer", "its error", "KL with it kept", "change"], rows))


def _inputs(found: dict[str, Any]) -> str:
    if not found["inputs"]:
        return ""
    observer, rows = found["observer"], []
    series: dict[str, list[float]] = {}
    for name, row in found["inputs"].items():
        amax, clipped = row["amax"].get(observer, [0.0]), row["clipped"].get(observer, [0.0])
        rows.append((name, f"{min(amax):.3g} to {max(amax):.3g}" if len(amax) > 1 else f"{amax[0]:.3g}",
                     f"{max(row['amax'].get('max', [0.0])):.3g}", f"{max(clipped):.1e}", sum(row["rows"])))
        series.setdefault(_role(name), []).append(max(amax))
    picture = plots.lines(series, title=f"Largest magnitude to represent, by {observer}", x="layer", y="amax", log=True)
    table = _table(["input of", f"amax by {observer}", "largest seen", "clipped share", "rows"], rows)
    return f"<h2>Inputs</h2>{_image(picture)}<details><summary>all {len(rows)}</summary>{table}</details>"


def _role(name: str) -> str:
    words = [word for word in name.split(".") if not word.isdigit() and word not in ("layers", "model", "weight")]
    return ".".join(words[-2:]) if words[0] != "vision_model" else f"vision {words[-1]}"


def _image(png: bytes) -> str:
    return f"<img src='data:image/png;base64,{base64.b64encode(png).decode()}'>"


def _table(head: list[str], rows: Any) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head) if any(head) else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{f'<tr>{titles}</tr>' if titles else ''}{body}</table>"
