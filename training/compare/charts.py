"""The curves of a race as one Vega-Lite specification: one legend, and one set of switches for all."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..colours import colour
from ..config import RunConfig
from ..run.outcome import Outcome
from .summary import REFERENCE

POINTS = 200
"""The most points of a curve; beyond, they are means over stretches of equal length."""
DASHES = ([1, 0], [5, 3], [2, 2])
SOLID = 7
"""This many lines differ by colour alone; further ones are dashed or dotted as well."""
CURVES = (
    ("heldout_loss", "held-out loss", "nats per token"),
    ("loss", "training loss", "nats per token"),
    ("learning_rate", "learning rate", "learning rate"),
    ("update_norm", "norm of the updates", "norm"),
    ("gradient_norm", "norm of the gradients before clipping", "norm"),
)
"""Name in the records, title, unit."""


def specification(outcomes: Sequence[Outcome], run: RunConfig) -> dict[str, Any]:
    """Bars of speed-up, and the curves of every optimizer against steps, seconds or tokens.

    Of several seeds the mean is drawn, and a band from the lowest to the highest.

    Args:
      outcomes: in the order of the legend; those without a step are left out.
      run: of the race.
    """
    drawn = [outcome for outcome in outcomes if outcome.steps]
    names = list(dict.fromkeys(outcome.name for outcome in drawn))
    scales = {
        "color": {
            "field": "optimizer",
            "scale": {"domain": names, "range": [colour(name) for name in names]},
            "legend": {"title": None, "orient": "top", "symbolType": "stroke", "symbolOpacity": 1},
        },
        "opacity": {"condition": {"param": "picked", "value": 1}, "value": 0.08},
    }
    if len(names) > SOLID:
        scales["strokeDash"] = {
            "field": "optimizer",
            "scale": {
                "domain": names,
                "range": [DASHES[index // SOLID % len(DASHES)] for index in range(len(names))],
            },
        }
    curves = [(curve, points) for curve in CURVES if (points := _points(drawn, curve[0], run))]
    charts = [
        _chart(points, *curve, scales, first=curve is curves[0][0]) for curve, points in curves
    ]
    if bars := _speedups(drawn, run):
        charts.insert(0, _bars(bars, names, scales["color"]))
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "params": [
            {
                "name": "along",
                "value": "steps",
                "bind": {
                    "input": "select",
                    "options": ["steps", "seconds", "tokens"],
                    "name": "against ",
                },
            },
            {"name": "smooth", "value": True, "bind": {"input": "checkbox", "name": "smoothed "}},
            {
                "name": "logarithmic",
                "value": False,
                "bind": {"input": "checkbox", "name": "logarithmic "},
            },
        ],
        "concat": charts,
        "columns": 2,
        "spacing": 30,
        "config": {"view": {"stroke": None, "continuousWidth": 400, "continuousHeight": 260}},
    }


def _chart(
    points: list[dict[str, Any]],
    name: str,
    title: str,
    unit: str,
    scales: Mapping[str, Any],
    *,
    first: bool,
) -> dict[str, Any]:
    """One measurement of all optimizers."""
    shown = lambda field: f"logarithmic ? log(datum.{field}) / LN10 : datum.{field}"
    smooth = "smooth ? datum.smooth : datum.value" if name != "heldout_loss" else "datum.value"
    x = {
        "field": "x",
        "type": "quantitative",
        "title": None,
        "axis": {"format": "~s", "grid": False, "tickCount": 6},
    }
    y = {
        "field": "y",
        "type": "quantitative",
        "title": unit,
        "scale": {"zero": False},
        "axis": {
            "labelExpr": "logarithmic ? format(pow(10, datum.value), '.3~g') : "
            "format(datum.value, '.4~g')",
            "tickCount": 6,
        },
    }
    tooltip = [
        {"field": "optimizer"},
        *({"field": field, "type": "quantitative", "format": ","} for field in ("steps", "tokens")),
        {"field": "seconds", "type": "quantitative", "format": ".1f"},
        {"field": "value", "type": "quantitative", "format": ".4~g", "title": title},
    ]
    hover = {
        "name": f"at_{name}",
        "select": {"type": "point", "nearest": True, "on": "pointermove", "clear": "pointerout"},
    }
    picked = {
        "name": "picked",
        "select": {"type": "point", "fields": ["optimizer"]},
        "bind": "legend",
    }
    lines: dict[str, Any] = {
        "mark": {"type": "line", "strokeWidth": 2, "point": False},
        "encoding": {"x": x, "y": y, **scales},
    }
    if first:
        lines["params"] = [picked]
    layers = [
        lines,
        {
            "params": [hover],
            "mark": {"type": "point", "filled": True, "size": 60},
            "encoding": {
                "x": x,
                "y": y,
                "color": scales["color"],
                "tooltip": tooltip,
                # A curve of one point would not be seen otherwise.
                "opacity": {
                    "condition": [
                        {"param": f"at_{name}", "empty": False, "value": 1},
                        {"test": "datum.alone", "value": 1},
                    ],
                    "value": 0,
                },
            },
        },
    ]
    if any("low" in point for point in points):
        band = {
            "transform": [
                {"calculate": shown("low"), "as": "y_low"},
                {"calculate": shown("high"), "as": "y_high"},
            ],
            "mark": "area",
            "encoding": {
                "x": x,
                "y": {"field": "y_low", "type": "quantitative", "scale": {"zero": False}},
                "y2": {"field": "y_high"},
                "color": scales["color"],
                "opacity": {"condition": {"param": "picked", "value": 0.15}, "value": 0.02},
            },
        }
        layers.insert(0, band)
    return {
        "title": {"text": title, "anchor": "start"},
        "data": {"values": points},
        "transform": [
            {"calculate": "datum[along]", "as": "x"},
            {"calculate": smooth, "as": "shown"},
            {"filter": "!logarithmic || datum.shown > 0"},
            {"calculate": shown("shown"), "as": "y"},
        ],
        "layer": layers,
    }


def _bars(
    bars: list[dict[str, Any]], names: Sequence[str], color: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "title": {
            "text": f"speed-up over {REFERENCE}, in tokens to its last loss",
            "anchor": "start",
        },
        "data": {"values": bars},
        "layer": [
            {"mark": {"type": "bar", "height": {"band": 0.7}}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4},
                "encoding": {
                    "text": {"field": "speedup", "format": ".2f"},
                    "color": {"value": "gray"},
                },
            },
        ],
        "encoding": {
            "y": {"field": "optimizer", "sort": list(names), "title": None},
            "x": {"field": "speedup", "type": "quantitative", "title": None},
            "color": color,
            "tooltip": [
                {"field": "optimizer"},
                {"field": "speedup", "type": "quantitative", "format": ".3f"},
            ],
        },
    }


def _speedups(outcomes: Sequence[Outcome], run: RunConfig) -> list[dict[str, Any]]:
    """Ratios of tokens, of those whose every seed came to the reference's last loss."""
    reference = {o.repeat: o for o in outcomes if o.name == REFERENCE and o.status == "finished"}
    found: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.name == REFERENCE:
            found[REFERENCE] = [1.0]
        elif (against := reference.get(outcome.repeat)) is not None:
            reached = outcome.reaching(against.final_loss)
            tokens = outcome.tokens(reached["step"], run) if reached else math.inf
            last = against.tokens(against.evaluations[-1]["step"], run)
            found.setdefault(outcome.name, []).append(last / max(tokens, 1))
    bars = [
        {"optimizer": name, "speedup": _short(statistics.fmean(ratios))}
        for name, ratios in found.items()
        if min(ratios) > 0
    ]
    return bars if reference and len(bars) > 1 else []


def _points(outcomes: Sequence[Outcome], name: str, run: RunConfig) -> list[dict[str, Any]]:
    """Every optimizer's curve of one measurement, the seeds put together step by step."""
    points = []
    for optimizer in dict.fromkeys(outcome.name for outcome in outcomes):
        seeds = [outcome for outcome in outcomes if outcome.name == optimizer]
        curves = [curve for outcome in seeds if (curve := _curve(outcome, name))]
        if not curves:
            continue
        length = min(map(len, curves))
        values = np.array([[value for *_, value in curve[:length]] for curve in curves])
        smooth = np.array([_smoothed(row) for row in values])
        for at, part in enumerate(np.array_split(np.arange(length), min(length, POINTS))):
            step, seconds = (float(curves[0][part[-1]][index]) for index in (0, 1))
            point = {
                "optimizer": optimizer,
                "steps": step,
                "tokens": float(seeds[0].tokens(step, run)),
                "seconds": round(seconds, 2),
                "value": _short(values[:, part].mean()),
                "smooth": _short(smooth[:, part].mean()),
            }
            if len(curves) > 1:
                by_seed = (smooth if name != "heldout_loss" else values)[:, part].mean(axis=1)
                point |= {"low": _short(by_seed.min()), "high": _short(by_seed.max())}
            if length == 1 and at == 0:
                point["alone"] = True
            points.append(point)
    return points


def _short(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _curve(outcome: Outcome, name: str) -> list[tuple[float, float, float]]:
    """Step, seconds and value; what is not finite is left out."""
    records = outcome.evaluations if name == "heldout_loss" else outcome.steps
    rows = [record for record in records if name in record and math.isfinite(record[name])]
    return [(row["step"], row["seconds"], row[name]) for row in rows]


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, average, norm = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(average / norm)
    return out
