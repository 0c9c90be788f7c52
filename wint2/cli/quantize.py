"""`wint2 quantize`: a full-precision checkpoint of any family that is served to a 2-bit one."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from gpu_worker.config import ModelConfig
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.errors import CheckpointError, ConfigError
from gpu_worker.quantizer import calibration, memory, stages
from gpu_worker.quantizer.errors import QuantizeError
from gpu_worker.quantizer.pipeline import REPORT_NAME, quantize_checkpoint
from gpu_worker.quantizer.recipe import DenseFormat, LowFormat, Recipe, Tuning
from gpu_worker.quantizer.report import NAME as PAGE_NAME
from gpu_worker.quantizer.report import starved_experts
from gpu_worker.quantizer.source import Source
from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.tokenizer import load_tokenizer
from wint2.cli.run_typer import run_typer
from wint2.errors import EXIT_FAILED, CommandError
from wint2.progress import progress_bars

Effort = Literal["fast", "normal", "best"]
Device = Literal["auto", "cpu", "cuda"]
SEED_WINT4_LAYERS = 4  # MoE layers that ERNIE-4.5-300B-A47B-2Bits keeps in WINT4
MAX_SAMPLES = 2048


OptionalLayer = Annotated[
    int | None,
    typer.Option(help="last layer with WINT4 experts, -1 for none [default: the first four MoE layers]"),
]
LowEndLayer = Annotated[
    int | None,
    typer.Option(show_default=False, help="last layer with 2-bit experts, WINT4 again beyond [default: all]"),
]
CalibrationText = Annotated[
    Path | None, typer.Option("--calibration", help="UTF-8 text [default: the text that ships]")
]
TuneSteps = Annotated[
    int, typer.Option(min=0, help="end-to-end tuning afterwards; holds both models in memory")
]
TuneSamples = Annotated[
    int | None,
    typer.Option(
        min=0,
        show_default=False,
        help="windows the original writes itself to tune on, 0: calibration's "
        "[default: as many as the steps read, at most 2048]",
    ),
]
TuneRest = Annotated[
    bool, typer.Option(help="tuning moves norms, attention and shared MLPs, not the experts' scales alone")
]


def quantize(
    source: Annotated[Path, typer.Argument(help="checkpoint directory: Hugging Face's or Paddle's layout")],
    output: Annotated[Path, typer.Argument(help="directory to make; an unfinished run is resumed")],
    format: Annotated[LowFormat, typer.Option(help="of the routed experts; wint2t is the trellis")] = "wint2",
    wint4_end_layer: OptionalLayer = None,
    low_end_layer: LowEndLayer = None,
    dense: Annotated[DenseFormat, typer.Option(help="attention, dense and shared MLPs")] = "wint8",
    effort: Annotated[Effort, typer.Option(help="time against error; see docs/formats.md")] = "normal",
    device: Annotated[Device, typer.Option(help="auto: the GPU when there is one")] = "auto",
    calibration_file: CalibrationText = None,
    num_windows: Annotated[int, typer.Option(min=1, help="calibration windows")] = 64,
    window: Annotated[int, typer.Option(min=2, help="tokens a window")] = 512,
    held_out_windows: Annotated[int, typer.Option(min=0, help="windows to compare the result on")] = 4,
    min_rows: Annotated[int, typer.Option(min=1, help="calibration tokens an expert gets at least")] = 256,
    correct: Annotated[bool, typer.Option(help="fit weights to the original's outputs first")] = True,
    tune_steps: TuneSteps = 0,
    tune_batch: Annotated[int, typer.Option(min=1, help="windows a tuning step")] = 8,
    tune_samples: TuneSamples = None,
    tune_rest: TuneRest = True,
) -> None:
    """Quantize a checkpoint layer by layer, one expert in memory at a time; run again to resume."""
    try:
        config = read_model_config(source)
        end_layer = first_moe_layers(config) if wint4_end_layer is None else wint4_end_layer
        tuning = _tuning(tune_steps, tune_batch, tune_samples, tune_rest)
        recipe = Recipe(end_layer, low_end_layer, dense, format, effort, correct, correct, min_rows, tuning)
        ids = _token_ids(source, _read_text(calibration_file))
        ids_ST = calibration.windows(ids, num_windows + held_out_windows, window)
        model = Source(config, find_device(device))
        fitted_ST, held_out_ST = _split(ids_ST, held_out_windows)
        _announce(config, recipe, fitted_ST, model)
        with progress_bars() as show:
            report = quantize_checkpoint(model, output, fitted_ST, recipe, held_out_ST, show)
    except (ConfigError, CheckpointError, QuantizeError, TokenizerLoadError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{error.filename or output}: {error.strerror or error}", EXIT_FAILED) from error
    _conclude(output, report)


def _tuning(steps: int, batch: int, samples: int | None, rest: bool) -> Tuning:
    return Tuning(steps, batch, min(MAX_SAMPLES, steps * batch) if samples is None else samples, rest)


def first_moe_layers(config: ModelConfig) -> int:
    """The last of the MoE layers that the seed's recipe keeps in WINT4; fewer in a model of few layers."""
    moe = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    count = min(SEED_WINT4_LAYERS, len(moe) // 4)
    return moe[count - 1] if count else -1


def find_device(name: Device) -> torch.device:
    """The device asked for. Raises CommandError when there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError("--device cuda: no CUDA device is available")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _read_text(path: Path | None) -> str:
    try:
        return calibration.default_text() if path is None else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _token_ids(source: Path, text: str) -> list[int]:
    return load_tokenizer(source).encode(text, add_special_tokens=False)


def _split(ids_ST: torch.Tensor, held_out: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Windows to fit and windows to compare on; a short text keeps at least one to fit."""
    held_out = min(held_out, len(ids_ST) - 1)
    fitted_ST, held_out_ST = ids_ST[held_out:], ids_ST[:held_out]
    return fitted_ST, held_out_ST if held_out else None


def _announce(config: ModelConfig, recipe: Recipe, fitted_ST: torch.Tensor, model: Source) -> None:
    bound = memory.bound_bytes(config, recipe, fitted_ST.numel())
    output = size(memory.output_bytes(config, recipe))
    print(f"model        {size(model.num_bytes)}, {config.num_hidden_layers} layers, on {model.device}")
    runs = itertools.groupby(range(config.num_hidden_layers), recipe.expert_format)
    spans = [(name.upper(), list(layers)) for name, layers in runs]
    experts = ", ".join(f"{name} in layers {span[0]}-{span[-1]}" for name, span in spans)
    print(f"output       about {output}: experts {experts}; ", end="")
    print(f"attention and dense {recipe.dense}; effort {recipe.effort}")
    print(f"calibration  {' x '.join(map(str, fitted_ST.shape))} tokens")
    print(
        f"memory       at most {size(bound)} more than the {size(memory.peak_bytes())} of the program",
        flush=True,
    )


def _conclude(output: Path, report: dict[str, Any]) -> None:
    for note in starved_experts(report):
        print(f"warning: {note}", file=sys.stderr)
    for line in _stages(report):
        print(line)
    found = report.get("evaluation")
    if found:
        print(
            f"perplexity   {found['perplexity']:.3f}, the original's {found['reference_perplexity']:.3f}; ",
            end="",
        )
        print(f"KL {found['kl']:.4f} nats, top-1 agreement {found['top1_agreement']:.1%}")
    print(f"memory       peak {size(report['peak_memory_bytes'])}")
    print(f"written      {output} ({size(report['num_bytes'])}), {REPORT_NAME}, {PAGE_NAME}")


def _stages(report: dict[str, Any]) -> Iterator[str]:
    """What each stage of the encoder left of the error on calibration tokens, the mean of the layers."""
    yield f"{'left over':<13}{'':<38}{'up_gate':>8}{'down':>10}"
    for format, stage, up_gate, down in stages.table(report["layers"]):
        yield f"  {format:<11}{stage:<38}{up_gate:>8.4f}{down:>10.4f}"
    for name, without, fitted in stages.fits(report["layers"]):
        yield f"  {'stream':<11}{name + ' fitted':<38}{fitted:>8.5f} not {without:.5f}"
    untuned = report.get("untuned")
    if untuned:
        yield f"  {'KL':<11}{'tuned':<38}{report['evaluation']['kl']:>8.4f} not {untuned['kl']:.4f}"


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def main(arguments: list[str]) -> None:
    run_typer(quantize, arguments)
