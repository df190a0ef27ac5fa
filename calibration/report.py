"""The report of a calibration: one HTML file that holds its pictures, made from ``calibration.json`` alone.

``report.html.jinja`` is what people see; this file prepares the numbers, rows and pictures that stand in it.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from . import plots

Row = tuple[object, ...]


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Write the report of a calibration's description."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )
    text = environment.get_template("report.html.jinja").render(
        title=f"Calibration of {found['checkpoint']}", summary=_summary(found), experts=_experts(found),
        quality=_quality(found), inputs=_inputs(found),
    )
    path.write_text(text, encoding="utf-8")


def _summary(found: dict[str, Any]) -> list[Row]:
    data, quality = found["data"], found["quality"]
    rows = {
        "recipe": f"{found['recipe']}, observer {found['observer']}",
        "in high precision": ", ".join(found["high_precision_parts"]) or "nothing beyond the recipe",
        "data": f"{data['tokens']} tokens in {data['windows']} windows, {data['tiles']} image tiles; SHA-256 "
                f"{data['sha256'][:16]}…",
        "checkpoint": f"{found['checkpoint']}, fingerprint {found['fingerprint'][:16]}…",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    if quality:
        rows["against float32"] = (f"KL {quality['mean_kl']:.2e} per token, same top token {quality['top1']:.1%}, "
                                   f"perplexity {quality['perplexity']:.3f} ({quality['change']:+.2%})")
    return list(rows.items())


def _experts(found: dict[str, Any]) -> dict[str, Any] | None:
    """Tokens by layer and expert; None for a dense model."""
    coverage = found["coverage"]
    if not coverage["own"]:
        return None
    layers = sorted(coverage["own"], key=int)
    own_LE, shown_LE = (np.array([coverage[which][layer] for layer in layers]) for which in ("own", "shown"))
    picture = plots.heat_map(own_LE, title="Tokens that the router sent", x="expert", y="layer", labels=layers,
                             note="tokens (red: none)")
    return {
        "fewest": own_LE.min(), "most": own_LE.max(), "min_tokens_shown": coverage["min_tokens_shown"],
        "shown": int((shown_LE > 0).sum()), "count": own_LE.size, "picture": _base64(picture),
        "dead": [f"layer {layer} expert {expert}" for layer, expert in coverage["dead"]],
    }


def _quality(found: dict[str, Any]) -> dict[str, Any] | None:
    """Quality of all that was tried, and error of each layer; None when nothing was evaluated."""
    if not (quality := found["quality"]):
        return None
    variants = {f"high precision: {name}": row for name, row in quality["tried"].items()} | {"chosen": quality}
    attention, feed_forward = zip(*quality["layer_errors"], strict=True)
    picture = plots.lines({"attention": list(attention), "feed-forward": list(feed_forward)},
                          title="Error of each layer's own update, on exact inputs", x="layer", y="relative error")
    return {
        "tokens": quality["tokens"], "exact_perplexity": quality["exact_perplexity"], "picture": _base64(picture),
        "rows": [
            (name, f"{row['mean_kl']:.2e}", f"{row['top1']:.1%}", f"{row['perplexity']:.3f}", f"{row['change']:+.2%}")
            for name, row in variants.items()
        ],
        "worst_layers": [
            (layer, f"{max(quality['layer_errors'][int(layer)]):.2%}", f"{row['mean_kl']:.2e}",
             f"{row['mean_kl'] - quality['mean_kl']:+.1e}")
            for layer, row in quality["layers_in_high_precision"].items()
        ],
    }


def _inputs(found: dict[str, Any]) -> dict[str, Any] | None:
    """Magnitudes of every input, as a picture by role and layer and as rows; None when none was recorded."""
    observer, rows = found["observer"], []
    series: dict[str, list[float]] = {}
    for name, row in found["inputs"].items():
        amax, clipped = row["amax"].get(observer, [0.0]), row["clipped"].get(observer, [0.0])
        rows.append((name, f"{min(amax):.3g} to {max(amax):.3g}" if len(amax) > 1 else f"{amax[0]:.3g}",
                     f"{max(row['amax'].get('max', [0.0])):.3g}", f"{max(clipped):.1e}", sum(row["rows"])))
        series.setdefault(_role(name), []).append(max(amax))
    if not rows:
        return None
    picture = plots.lines(series, title=f"Largest magnitude to represent, by {observer}", x="layer", y="amax", log=True)
    return {"observer": observer, "rows": rows, "picture": _base64(picture)}


def _role(name: str) -> str:
    words = [word for word in name.split(".") if not word.isdigit() and word not in ("layers", "model", "weight")]
    return ".".join(words[-2:]) if words[0] != "vision_model" else f"vision {words[-1]}"


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
