"""The report of a calibration: one HTML file that holds its pictures, made from ``calibration.json`` alone.

``report.html.jinja`` is what people see; this file prepares the numbers, rows and pictures that stand in it.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from ..console import quantity
from . import plots

Row = tuple[object, ...]

_IN_LAYER = re.compile(r"(?P<images>vision_model\.)?(?:model\.)?layers\.(?P<layer>\d+)\."
                       r"(?:feed_forward\.)?(?P<role>.+?)(?:\.weight)?")


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Write the report of a calibration's description."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )
    text = environment.get_template("report.html.jinja").render(
        title=_title(found), summary=_summary(found), experts=_experts(found),
        quality=_quality(found), inputs=_inputs(found),
    )
    path.write_text(text, encoding="utf-8")


def change(quality: dict[str, Any]) -> str:
    """A change of the perplexity with twice its standard error, called noise when it is smaller."""
    found, noise = quality["change"], 2 * quality["noise"]
    return f"{found:+.2%} ± {noise:.2%}" + (", noise" if abs(found) < noise else "")


def expert_picture(found: dict[str, Any]) -> bytes:
    """Tokens by layer and expert of a mixture's calibration, as PNG."""
    own, dead = found["coverage"]["own"], found["coverage"]["dead"]
    return plots.heat_map(_by_layer(own).T, title="Tokens that the router sent", x="layer", y="expert",
                          labels=sorted(own, key=int), note="tokens (red: none)" if dead else "tokens")


def layer_picture(found: dict[str, Any]) -> bytes:
    """Error of every layer of a calibration that was evaluated, as PNG."""
    attention, feed_forward = zip(*found["quality"]["layer_errors"], strict=True)
    return plots.lines({"attention": dict(enumerate(attention)), "feed-forward": dict(enumerate(feed_forward))},
                       title="Error of each layer's own update, on exact inputs", x="layer", y="relative error")


def _by_layer(counts: dict[str, list[int]]) -> plots.Rows:
    return np.array([counts[layer] for layer in sorted(counts, key=int)])


def _title(found: dict[str, Any]) -> str:
    return (f"Calibration of {found['checkpoint']}: {quantity(found['parameters'])} parameters, fingerprint "
            f"{found['fingerprint'][:8]}")


def _summary(found: dict[str, Any]) -> list[Row]:
    data, quality = found["data"], found["quality"]
    rows = {
        "scales": f"observer {found['observer']}",
        "Hessians": "of weights in 4 bits" if found["hessians"] else "none",
        "in high precision in fp8": ", ".join(found["high_precision_parts"]) or "nothing beyond the recipe",
        "data": f"{data['tokens']} tokens in {data['windows']} windows, {data['tiles']} image tiles; SHA-256 "
                f"{data['sha256'][:16]}…",
        "checkpoint": f"{found['checkpoint']}, fingerprint {found['fingerprint']}",
        "versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    if quality:
        rows["fp8 against float32"] = (f"KL {quality['mean_kl']:.2e} per token, same top token {quality['top1']:.1%}, "
                                   f"perplexity {quality['perplexity']:.3f} ({change(quality)})")
    return list(rows.items())


def _experts(found: dict[str, Any]) -> dict[str, Any] | None:
    """Tokens by layer and expert; None for a dense model."""
    coverage = found["coverage"]
    if not coverage["own"]:
        return None
    own_LE, shown_LE = (_by_layer(coverage[which]) for which in ("own", "shown"))
    return {
        "fewest": own_LE.min(), "most": own_LE.max(), "min_tokens_shown": coverage["min_tokens_shown"],
        "shown": int((shown_LE > 0).sum()), "count": own_LE.size, "picture": _base64(expert_picture(found)),
        "dead": [f"layer {layer} expert {expert}" for layer, expert in coverage["dead"]],
    }


def _quality(found: dict[str, Any]) -> dict[str, Any] | None:
    """Quality of all that was tried, and error of each layer; None when nothing was evaluated."""
    if not (quality := found["quality"]):
        return None
    variants = {f"high precision: {name}": row for name, row in quality["tried"].items()} | {"chosen": quality}
    return {
        "tokens": quality["tokens"], "exact_perplexity": quality["exact_perplexity"],
        "picture": _base64(layer_picture(found)),
        "rows": [
            (name, f"{row['mean_kl']:.2e}", f"{row['top1']:.1%}", f"{row['perplexity']:.3f}", change(row))
            for name, row in variants.items()
        ],
        "worst_layers": [
            (layer, f"{max(quality['layer_errors'][int(layer)]):.2%}", f"{row['mean_kl']:.2e}",
             f"{row['mean_kl'] - quality['mean_kl']:+.1e}")
            for layer, row in quality["layers_in_high_precision"].items()
        ],
    }


def _inputs(found: dict[str, Any]) -> dict[str, Any] | None:
    """Magnitudes of every input, as pictures by role and layer and as rows; None when none was recorded."""
    observer, rows = found["observer"], []
    for name, row in found["inputs"].items():
        amax, clipped = row["amax"].get(observer, [0.0]), row["clipped"].get(observer, [0.0])
        rows.append((name, f"{min(amax):.3g} to {max(amax):.3g}" if len(amax) > 1 else f"{amax[0]:.3g}",
                     f"{max(row['amax'].get('max', [0.0])):.3g}", f"{max(clipped):.1e}", sum(row["rows"])))
    if not rows:
        return None
    pictures = [
        _base64(plots.lines(series, title=f"Largest magnitude of {part} inputs, by {observer}", x="layer", y="amax",
                            log=True))
        for part, series in _magnitudes(found).items()
    ]
    return {"observer": observer, "rows": rows, "pictures": pictures}


def _magnitudes(found: dict[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """Magnitude by part of the model, role and layer. Roles that read the same input are one; no layer, no line."""
    parts: dict[str, dict[str, dict[int, float]]] = {}
    for name, row in found["inputs"].items():
        if match := _IN_LAYER.fullmatch(name):
            roles = parts.setdefault("the image tower's" if match["images"] else "the decoder's", {})
            roles.setdefault(match["role"], {})[int(match["layer"])] = max(row["amax"].get(found["observer"], [0.0]))
    return {part: _merged(roles) for part, roles in parts.items()}


def _merged(roles: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Roles with the same values under one name."""
    names: dict[tuple[tuple[int, float], ...], list[str]] = {}
    for role, points in roles.items():
        names.setdefault(tuple(points.items()), []).append(role)
    return {", ".join([same[0], *(role.split(".")[-1] for role in same[1:])]): dict(points)
            for points, same in names.items()}


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()
