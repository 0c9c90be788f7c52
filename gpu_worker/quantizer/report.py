"""quantization_report.json as one HTML page that needs nothing else: figures, plots, light and dark."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from gpu_worker.quantizer import stages

NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("report_template.html")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 180, 56, 22

Layer = dict[str, Any]


def render(report: dict[str, Any]) -> str:
    """The page for a report."""
    layers: list[Layer] = report["layers"]
    plots = [
        _plot(
            "Output error of the projections", "|x(W − Ŵ)|² / |xW|², mean of a layer", _output_errors(layers)
        ),
        _plot(
            "Error of the residual stream",
            "|h − ĥ|² / |h|² behind the layer",
            [layer["stream_error"] for layer in layers],
        ),
        _plot("Weight error", "|W − Ŵ|² / |W|², mean of the routed experts", _weight_errors(layers)),
        _plot(
            "Bits per weight",
            "all projections of a layer, scales included",
            [_bits(layer) for layer in layers],
        ),
        _plot("Tokens of the least seen expert", "calibration tokens", _tokens(layers, min)),
        _plot("Tokens of the most seen expert", "calibration tokens", _tokens(layers, max)),
    ]
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(report["source"]["name"]),
        tiles="".join(_tile(*tile) for tile in _tiles(report)),
        notes="".join(f"<p class=warn>{html.escape(note)}</p>" for note in starved_experts(report)),
        stages="".join(map(_cells, _stages(report))),
        plots="".join(plots),
        rows="".join(_row(number, layer) for number, layer in enumerate(layers)),
    )


def starved_experts(report: dict[str, Any]) -> list[str]:
    """A warning for each layer whose experts saw too few calibration tokens."""
    wanted = report["recipe"]["min_rows"]
    notes = []
    for number, layer in enumerate(report["layers"]):
        few = [count for count in layer["rows_per_expert"] if count < wanted]
        if few:
            notes.append(
                f"layer {number}: {len(few)} of {len(layer['rows_per_expert'])} experts saw under {wanted} "
                f"calibration tokens (the rarest {min(few)}) and were lent those their router likes best"
            )
    return notes


def _tiles(report: dict[str, Any]) -> Iterable[tuple[str, str]]:
    projections = [p for layer in report["layers"] for p in layer["projections"]]
    weights = sum(p["num_weights"] for p in projections)
    bits = 8 * sum(p["num_bytes"] for p in projections) / weights
    yield "bits per weight", f"{bits:.3f}"
    yield "size", f"{report['num_bytes'] / 1e9:.3f} GB of {report['source']['num_bytes'] / 1e9:.3f}"
    yield "calibration", " × ".join(map(str, report["calibration"])) + " tokens"
    yield "peak memory", f"{report['peak_memory_bytes'] / 2**30:.2f} GiB"
    losses = report["tuning"]
    if losses:
        yield "tuning", f"{len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}"
    found = report.get("evaluation")
    if found:
        yield "perplexity", f"{found['perplexity']:.3f} (original {found['reference_perplexity']:.3f})"
        yield "KL to the original", f"{found['kl']:.4f} nats a token"
        yield "top-1 agreement", f"{found['top1_agreement']:.1%}"


def _tile(label: str, value: str) -> str:
    return f"<div class=tile><b>{html.escape(value)}</b><span>{html.escape(label)}</span></div>"


def _stages(report: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    """What was done, to what, and what was left of the error."""
    for format, stage, up_gate, down in stages.table(report["layers"]):
        yield stage, f"{format} experts", f"up_gate {up_gate:.4f}, down {down:.4f} of the output"
    for name, without, fitted in stages.fits(report["layers"]):
        yield "fitted", name, f"{fitted:.5f} of the residual stream, {without:.5f} without"
    untuned = report.get("untuned")
    if untuned:
        found = report["evaluation"]
        yield (
            "tuned",
            f"{len(report['tuning'])} steps",
            f"KL {found['kl']:.4f} nats, {untuned['kl']:.4f} before",
        )


def _cells(cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"


def _row(number: int, layer: Layer) -> str:
    experts = _experts(layer)
    formats = sorted({p["format"] for p in layer["projections"]})
    cells = [str(number), ", ".join(formats), f"{_bits(layer):.3f}", f"{layer['stream_error']:.4f}"]
    cells += [f"{_mean(experts, 'weight_error'):.4f}", f"{_mean(experts, 'output_error'):.4f}"]
    return _cells(cells)


def _plot(title: str, unit: str, values: Sequence[float]) -> str:
    """A bar a layer; hovering one shows its value."""
    top = max([*values, 1e-12])
    step = (_WIDTH - _LEFT) / max(1, len(values))
    bars = "".join(
        f'<rect x="{_LEFT + i * step:.1f}" y="{_HEIGHT * (1 - value / top):.1f}" width="{step * 0.8:.1f}" '
        f'height="{_HEIGHT * value / top:.1f}"><title>layer {i}: {value:.5g}</title></rect>'
        for i, value in enumerate(values)
    )
    lines = "".join(_grid_line(part, top) for part in (0, 0.5, 1))
    last = f'<text x="{_WIDTH}" y="{_HEIGHT + 16}" text-anchor="end">layer {len(values) - 1}</text>'
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> {html.escape(unit)}</figcaption>"
        f'<svg viewBox="0 -8 {_WIDTH} {_HEIGHT + _BOTTOM + 8}" role="img">{lines}{bars}'
        f'<text x="{_LEFT}" y="{_HEIGHT + 16}">layer 0</text>{last}</svg></figure>'
    )


def _grid_line(part: float, top: float) -> str:
    y = _HEIGHT * (1 - part)
    line = f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'{line}<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{part * top:.3g}</text>'


def _output_errors(layers: list[Layer]) -> list[float]:
    return [_mean(_experts(layer), "output_error") for layer in layers]


def _weight_errors(layers: list[Layer]) -> list[float]:
    return [_mean(_experts(layer), "weight_error") for layer in layers]


def _experts(layer: Layer) -> list[dict[str, Any]]:
    return [p for p in layer["projections"] if ".experts." in p["name"]]


def _mean(projections: list[dict[str, Any]], key: str) -> float:
    values: list[float] = [p[key] for p in projections if p[key] is not None]
    return sum(values) / len(values) if values else 0.0


def _bits(layer: Layer) -> float:
    num_bytes, num_weights = (
        sum(p[key] for p in layer["projections"]) for key in ("num_bytes", "num_weights")
    )
    return float(8 * num_bytes / num_weights)


def _tokens(layers: list[Layer], pick: Any) -> list[float]:
    return [float(pick(layer["rows_per_expert"])) if layer["rows_per_expert"] else 0.0 for layer in layers]
