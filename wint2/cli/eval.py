"""`wint2 eval`: perplexity of a checkpoint on a text; KL and top-1 agreement with another checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.errors import CheckpointError, ConfigError
from gpu_worker.quantizer import calibration
from gpu_worker.quantizer.errors import QuantizeError
from gpu_worker.quantizer.evaluate import Evaluation, evaluate
from gpu_worker.quantizer.source import Source
from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.tokenizer import load_tokenizer
from wint2.cli.quantize import Device, find_device
from wint2.cli.run_typer import run_typer
from wint2.errors import EXIT_FAILED, CommandError
from wint2.progress import progress_bars


def evaluate_text(
    directory: Annotated[Path, typer.Argument(help="checkpoint, quantized or not")],
    text: Annotated[Path, typer.Option(help="UTF-8 text")],
    reference: Annotated[Path | None, typer.Option(help="checkpoint to compare with")] = None,
    num_windows: Annotated[int, typer.Option(min=1, help="windows, spread evenly over the text")] = 12,
    window: Annotated[int, typer.Option(min=2, help="tokens a window")] = 512,
    device: Annotated[Device, typer.Option(help="auto: the GPU when there is one")] = "auto",
) -> None:
    """Evaluate a checkpoint on a text, layer by layer."""
    try:
        place = find_device(device)
        ids = load_tokenizer(directory).encode(text.read_text(encoding="utf-8"), add_special_tokens=False)
        ids_ST = calibration.windows(ids, num_windows, window)
        model = Source(read_model_config(directory), place)
        other = None if reference is None else Source(read_model_config(reference), place)
        with progress_bars() as show, torch.inference_mode():
            found = evaluate(model, ids_ST, other, show)
    except (ConfigError, CheckpointError, QuantizeError, TokenizerLoadError, UnicodeDecodeError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}", EXIT_FAILED) from error
    _show(found)


def _show(found: Evaluation) -> None:
    for name, value in asdict(found).items():
        if value is not None:
            text = f"{value:.4f}" if isinstance(value, float) else str(value)
            print(f"{name.replace('_', ' '):<22} {text}")


def main(arguments: list[str]) -> None:
    run_typer(evaluate_text, arguments)
