"""Draws docs/img from docs/results: SVGs that stand alone and can be read on light and on dark pages.

python -m tests.bench.plots
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.results import load

DOCS = Path(__file__).parents[2] / "docs"
INK = "#1f2328"  # becomes the page's own colour of text
COLORS = {"wint2": "#d1495b", "wint4": "#2e86ab", "torch int4": "#6a994e", "torch bfloat": "#9a6fb0"}
LANES = {
    "attention": ("attention",),
    "dense layers": ("tiled_", "nvjet", "splitKreduce", "gemm", "untile"),
    "experts": ("expert", "moe", "dispatch", "combine", "fragment_", "halve_rows"),
    "norm, rope, KV, router": ("rms_norm", "rope", "kv_store", "route"),
}
OTHER = "others"
# FastDeploy's PR #3037: dispatch, experts and reduce of the same layer; its GPU is not named. Milliseconds.
FASTDEPLOY = {
    1: (0.24163, 0.19069, 0.51430),
    2: (0.43128, 0.32896, 0.91387),
    4: (0.65259, 0.48686, 1.51325),
    16: (1.13858, 0.85099, 2.84870),
    64: (1.40544, 1.04264, 3.64651),
    128: (1.82971, 1.37995, 3.69851),
    512: (3.71688, 3.22378, 4.38523),
    1024: (6.16638, 5.51800, 6.82538),
}
AIMS_300B = {1: 100, 64: 1500}  # tokens a second by concurrency
Rows = list[dict[str, Any]]

STYLE = "<style>svg { color: #1f2328 } @media (prefers-color-scheme: dark) { svg { color: #e6edf3 } }</style>"


def main() -> None:
    draw_all(DOCS / "results", DOCS / "img")


def draw_all(results: Path, images: Path) -> None:
    """Every picture for which there are figures."""
    images.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "wint2", "font.size": 9}
    matplotlib.rcParams |= dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK)
    matplotlib.rcParams |= {"xtick.color": INK, "ytick.color": INK, "font.family": "sans-serif"}
    pictures: dict[str, tuple[tuple[str, ...], Callable[..., Figure]]] = {
        "experts_300b": (("moe_wint2_300b",), draw_experts),
        "experts_21b": (("moe_wint2_21b",), draw_experts),
        "serving": (("serving_300b", "stack_300b", "serving_21b", "stack_21b"), draw_serving),
        "timeline_300b": (("serving_300b",), draw_timelines),
    }
    for name, (needed, draw) in pictures.items():
        paths = [results / f"{file}.json" for file in needed]
        if all(path.exists() for path in paths):
            write(draw(*map(load, paths)), images / f"{name}.svg")


def write(figure: Figure, path: Path) -> None:
    """The SVG without a background, its ink in the colour that the page's scheme asks for."""
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    text = path.read_text().replace(INK, "currentColor")
    head = text.index(">", text.index("<svg")) + 1
    path.write_text(
        "\n".join(line.rstrip() for line in (text[:head] + STYLE + text[head:]).splitlines()) + "\n"
    )


def draw_experts(figures: dict[str, Any]) -> Figure:
    """Time of a layer's experts, and the share of the copy rate at which their weights are read."""
    (name, rows), copy = next(iter(figures["layers"].items())), figures["copy_bytes"]
    figure = Figure(figsize=(10, 4.2))
    times, shares = figure.subplots(1, 2)
    for op, color in COLORS.items():
        tokens, seconds, rates = columns(rows, op, "seconds", "bytes_per_second")
        times.plot(tokens, [s * 1e6 for s in seconds], "o-", color=color, label=label(op), markersize=3)
        few = [(n, 100 * r / copy) for n, r in zip(tokens, rates, strict=True) if n <= 128]
        shares.plot(*zip(*few, strict=True), "o-", color=color, label=label(op), markersize=3)
    tokens, seconds, limits = roofline(rows, figures)
    times.plot(tokens, [s * 1e6 for s in limits], "--", color=INK, label="wint2's roofline", linewidth=1)
    if name == "300b":
        for column, (op, color) in enumerate(list(COLORS.items())[:2]):
            found = [(n, 1e3 * ms[column]) for n, ms in FASTDEPLOY.items()]
            times.plot(*zip(*found, strict=True), ":", color=color, label=f"FastDeploy's {op}, PR #3037")
    finish(times, "tokens", "µs, ERNIE-4.5-" + name.upper() + "'s experts", is_log=True)
    shares.axhline(100, color=INK, linestyle="--", linewidth=1)
    finish(shares, "tokens", f"% of the copy rate, {copy / 1e12:.2f} TB/s")
    shares.set_ylim(0, 108)
    figure.suptitle(origin(figures))
    return figure


def columns(rows: Rows, op: str, *names: str) -> tuple[list[Any], ...]:
    """Tokens and the named figures of one op."""
    mine = [row for row in rows if row["op"] == op]
    return tuple([row[name] for row in mine] for name in ("tokens", *names))


def roofline(rows: Rows, figures: dict[str, Any]) -> tuple[list[int], list[float], list[float]]:
    """Tokens, what wint2 took, and what its bytes or its operations would take at the machine's best."""
    tokens, seconds, rates, flops = columns(rows, "wint2", "seconds", "bytes_per_second", "flops")
    limits = [
        max(s * r / figures["copy_bytes"], s * f / figures["bfloat_flops"])
        for s, r, f in zip(seconds, rates, flops, strict=True)
    ]
    return tokens, seconds, limits


def label(op: str) -> str:
    return {"torch int4": "torch's int4", "torch bfloat": "torch's bfloat"}.get(op, op)


def draw_serving(
    engine_300b: dict[str, Any],
    stack_300b: dict[str, Any],
    engine_21b: dict[str, Any],
    stack_21b: dict[str, Any],
) -> Figure:
    """Tokens a second by the number of requests, with the aims."""
    figure = Figure(figsize=(10, 4.2))
    pairs = (("300B", engine_300b, stack_300b), ("21B", engine_21b, stack_21b))
    for axes, (name, engine, stack) in zip(figure.subplots(1, 2), pairs, strict=True):
        curve(axes, step_rates(engine, "as served"), "o-", color=COLORS["wint2"], label="engine")
        for kind, color in (("decode_tokens_per_second", "wint4"), ("tokens_per_second", "torch int4")):
            rates = {int(n): row[kind] for n, row in stack["rates"].items()}
            text = "stack, after the first token" if "decode" in kind else "stack, prompts included"
            curve(axes, rates, "o-", color=COLORS[color], label=text, markersize=3)
        plain = step_rates(engine, "without CUDA graphs")
        curve(axes, plain, "x", color=INK, label="engine, no CUDA graphs")
        if name == "300B":
            curve(axes, AIMS_300B, "*", color="#e09f3e", markersize=12, label="aim")
        finish(axes, "requests at once", f"tokens a second, ERNIE-4.5-{name}", is_log=True)
        axes.set_title(origin(engine), fontsize=9)
    return figure


def step_rates(engine: dict[str, Any], way: str) -> dict[int, float]:
    """Tokens a second by the number of requests."""
    return {int(n): int(n) / seconds for n, seconds in engine["ways"][way]["step_seconds"].items()}


def curve(axes: Axes, points: dict[int, float], style: str, **keywords: Any) -> None:
    axes.plot(list(points), list(points.values()), style, **keywords)


def draw_timelines(figures: dict[str, Any]) -> Figure:
    """The kernels of one layer, from one attention to the next, in decode steps of few and of many."""
    steps = {name: step for name, step in figures["timelines"].items() if name.startswith("decode")}
    figure = Figure(figsize=(10, 2.1 * len(steps) + 0.5))
    for axes, (name, step) in zip(
        figure.subplots(len(steps), 1, squeeze=False).flat, steps.items(), strict=True
    ):
        draw_layer(axes, one_layer(step))
        share = 100 * step["share_without_kernel"]
        whole = f"{name}: {step['clock_seconds'] * 1e3:.2f} ms a step, no kernel for {share:.1f}%; one layer"
        axes.set_title(whole, fontsize=9, loc="left")
    axes.set_xlabel("µs")
    figure.suptitle(f"ERNIE-4.5-{figures['shape'].upper()}, {origin(figures)}", fontsize=9)
    return figure


def one_layer(step: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Name, start and end of the kernels between two attentions in the middle of the step."""
    events = [(step["names"][index], start, end) for index, start, end in step["events"]]
    attentions = [start for name, start, _ in events if "attention_decode" in name]
    begin, stop = attentions[len(attentions) // 2 : len(attentions) // 2 + 2]
    return [(name, start - begin, end - begin) for name, start, end in events if begin <= start < stop]


def draw_layer(axes: Axes, events: list[tuple[str, float, float]]) -> None:
    lanes = [*LANES, OTHER]
    for name, start, end in events:
        lane = next((lane for lane, words in LANES.items() if any(word in name for word in words)), OTHER)
        color = [*COLORS.values(), INK][lanes.index(lane)]
        axes.barh(lanes.index(lane), end - start, left=start, color=color, edgecolor=INK, linewidth=0.3)
    for start, end in idle(events):
        axes.axvspan(start, end, color="#e09f3e", alpha=0.35, linewidth=0)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.set_ylim(-0.6, len(lanes) - 0.4)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def idle(events: Iterable[tuple[str, float, float]]) -> list[tuple[float, float]]:
    """When no kernel runs."""
    found, reached = [], 0.0
    for _, start, end in sorted(events, key=lambda event: event[1]):
        if start > reached:
            found.append((reached, start))
        reached = max(reached, end)
    return found


def finish(axes: Axes, x: str, y: str, *, is_log: bool = False) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if is_log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=INK, alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)


def origin(figures: dict[str, Any]) -> str:
    return f"{figures['device']}, {figures['date']}"


if __name__ == "__main__":
    main()
