"""FastDeploy's flags in the words of `wint2 serve`: renamed, noted as needless, or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field

# Same meaning, other name.
RENAMED = {
    "tp": "tensor-parallel-size",
    "num-gpu-blocks-override": "num-kv-blocks",
    "max-concurrency": "max-waiting",
    "scheduler-max-size": "max-waiting",
    "max-waiting-time": "queue-timeout",
    "scheduler-ttl": "request-timeout",
    "timeout": "request-timeout",
    "timeout-graceful-shutdown": "drain-timeout",
    "load-choices": "load-format",
}

# FastDeploy's ways of saying "no limit"; the flag is then left out.
UNLIMITED: dict[str, frozenset[str]] = {
    "max-concurrency": frozenset({"0", "-1"}),
    "scheduler-max-size": frozenset({"0", "-1"}),
    "max-waiting-time": frozenset({"0", "-1"}),
    "scheduler-ttl": frozenset({"0", "-1"}),
    "timeout": frozenset({"0"}),
    "timeout-graceful-shutdown": frozenset({"0"}),
}

# Accepted, because what they ask for is so already or concerns a mechanism that is not here.
NOTES: dict[str, tuple[str, ...]] = {
    "no such port is needed": ("pd-comm-port", "rdma-comm-ports", "controller-port"),
    "KV blocks are taken one by one as a sequence grows, from one pool": (
        "kv-cache-ratio",
        "static-decode-blocks",
        "prealloc-dec-block-slot-num-threshold",
    ),
    "the KV blocks of answers are always kept for reuse": ("enable-output-caching",),
    "logprobs are always on": ("enable-logprob",),
    "a prompt's pieces share the steps' token budget": (
        "max-num-partial-prefills",
        "max-long-partial-prefills",
        "long-prefill-token-threshold",
        "disable-chunked-mm-input",
    ),
    "scheduling is a service of the gateway and needs no Redis": (
        "scheduler-host",
        "scheduler-port",
        "scheduler-db",
        "scheduler-password",
        "scheduler-topic",
        "scheduler-min-load-score",
        "scheduler-load-shards-num",
        "scheduler-sync-period",
        "scheduler-expire-period",
        "scheduler-release-load-expire-period",
        "scheduler-reader-parallel",
        "scheduler-writer-parallel",
        "scheduler-reader-batch-size",
        "scheduler-writer-batch-size",
        "sync-period",
        "expire-period",
        "release-load-expire-period",
        "reader-parallel",
        "writer-parallel",
        "reader-batch-size",
        "writer-batch-size",
    ),
    "the worker warms itself up before it says that it is ready": ("use-warmup",),
    "the next step is prepared as the engine sees fit": ("enable-overlap-schedule",),
    "structured output is always offered, by llguidance": ("guided-decoding-backend",),
    "the MoE layer chooses its own tiles": ("enable-chunked-moe", "chunked-moe-size"),
    "it concerns communication that is not used here": (
        "disable-custom-all-reduce",
        "enable-flashinfer-allreduce-fusion",
        "use-internode-ll-two-stage",
        "disable-sequence-parallel-moe",
        "shutdown-comm-group-if-worker-idle",
        "cache-transfer-protocol",
        "write-policy",
        "load-strategy",
        "local-data-parallel-id",
    ),
    "logits are always computed in float32": ("lm-head-fp32",),
    "ports are always checked before anything loads": ("skip-port-check",),
    "no image ever reaches this server": ("max-encoder-cache", "max-processor-cache"),
}

# Refused: leaving them out would change the answers, or what the caller may rely on.
REFUSALS: dict[str, tuple[str, ...]] = {
    "nothing is downloaded: give --model the checkpoint's directory": ("revision", "model-config-name"),
    "the tokenizer runs beside the gateway and is no remote service": ("tokenizer-base-url",),
    "this server generates text and nothing else": ("task", "runner", "convert", "override-pooler-config"),
    "there is one implementation of the model": ("model-impl",),
    "models that see images are not supported": (
        "enable-mm",
        "enable-mm-output",
        "limit-mm-per-prompt",
        "mm-processor-kwargs",
    ),
    "parsing of reasoning and tool calls is not switched on by this flag": (
        "reasoning-parser",
        "tool-call-parser",
        "tool-parser-plugin",
    ),
    "weights are read once, at the start": ("dynamic-load-weight", "rsync-config"),
    "nothing is quantized while loading: run `wint2 quantize IN OUT` once and serve OUT": ("quantization",),
    "experts are split over GPUs by --tensor-parallel-size only": (
        "enable-expert-parallel",
        "enable-eplb",
        "eplb-config",
    ),
    "the stack of one `wint2 serve` runs on one machine; join machines by `python -m gateway.scheduler`": (
        "ips",
        "router",
    ),
    "the KV cache lives in the worker's own memory": ("swap-space", "kvcache-storage-backend"),
    "prompts and answers are computed by the same worker": ("splitwise-role",),
    "only the local scheduler is known; several gateways share `python -m gateway.scheduler`": (
        "scheduler-name",
    ),
    "sparse attention is not offered": ("plas-attention-config",),
    "answers are not stopped early": ("early-stop-config", "enable-early-stop"),
    "there is no speculative decoding": ("speculative-config",),
    "white space in structured output is bounded, not forbidden": ("guided-decoding-disable-any-whitespace",),
    "logits processors cannot be loaded by name": ("logits-processors",),
    "the answer has no place for it": (
        "enable-keep-sampling-mask",
        "enable-entropy",
        "routing-replay-config",
    ),
    "at most 20 logprobs a token are given, taken before any penalty": ("max-logprobs", "logprobs-mode"),
    "flags come from the command line or from WINT2_SERVE_* variables": ("config",),
}

# Values that ask for what is so anyway; the flag is then passed over in silence.
HARMLESS: dict[str, frozenset[str]] = {
    "revision": frozenset({"master"}),
    "model-config-name": frozenset({"config.json"}),
    "task": frozenset({"generate"}),
    "runner": frozenset({"auto", "generate"}),
    "convert": frozenset({"auto", "none"}),
    "model-impl": frozenset({"auto", "fastdeploy"}),
    "quantization": frozenset({"wint2"}),
    "splitwise-role": frozenset({"mixed"}),
    "scheduler-name": frozenset({"local"}),
    "max-logprobs": frozenset({"20"}),
    "logprobs-mode": frozenset({"raw_logprobs"}),
    "controller-port": frozenset({"-1"}),
    "swap-space": frozenset({"0"}),
}

_NOTE_OF = {name: sentence for sentence, names in NOTES.items() for name in names}
_REFUSAL_OF = {name: sentence for sentence, names in REFUSALS.items() for name in names}


class RefusedFlagError(ValueError):
    """A flag of FastDeploy's that cannot be honoured here."""


@dataclass(frozen=True, slots=True)
class Flag:
    """One flag with its values, as written: `--name value`, `--name=value`, `--name_with_underscores`."""

    written: list[str]

    @property
    def name(self) -> str:
        head = self.written[0].partition("=")[0]
        return head.lstrip("-").replace("_", "-").removeprefix("no-") if head.startswith("-") else ""

    @property
    def value(self) -> str:
        _, equals, tail = self.written[0].partition("=")
        return tail if equals else " ".join(self.written[1:])

    @property
    def words(self) -> list[str]:
        """As written, but with dashes in the name."""
        head, equals, tail = self.written[0].partition("=")
        return [head.replace("_", "-") + equals + tail, *self.written[1:]]


@dataclass(slots=True)
class Translation:
    """The command line in this project's words, and what to tell its author."""

    arguments: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def translate(arguments: list[str]) -> Translation:
    """Rewrites FastDeploy's flags; what it does not know it passes on. Raises RefusedFlagError."""
    result = Translation()
    for flag in _flags(arguments):
        _translate_flag(flag, result)
    return result


def _translate_flag(flag: Flag, result: Translation) -> None:
    if flag.value in HARMLESS.get(flag.name, ()):
        return
    if flag.name in _REFUSAL_OF:
        raise RefusedFlagError(f"--{flag.name}: {_REFUSAL_OF[flag.name]}")
    if flag.name in _NOTE_OF:
        result.notes.append(f"--{flag.name} is not needed: {_NOTE_OF[flag.name]}")
    elif flag.name == "graph-optimization-config":
        result.arguments.append(_graph_flag(flag.value))
    elif flag.name in RENAMED:
        _rename(flag, result)
    else:
        result.arguments += flag.words


def _flags(arguments: list[str]) -> Iterator[Flag]:
    """Cuts the command line before every word that begins with a dash, negative numbers excepted."""
    words: list[str] = []
    for word in arguments:
        if words and word.startswith("-") and not word.lstrip("-").isdecimal():
            yield Flag(words)
            words = []
        words.append(word)
    if words:
        yield Flag(words)


def _rename(flag: Flag, result: Translation) -> None:
    new_name, value = RENAMED[flag.name], flag.value
    if value in UNLIMITED.get(flag.name, ()):
        result.notes.append(f"--{flag.name} {value} asks for no limit: --{new_name} keeps its default")
        return
    if flag.name == "load-choices":
        value = "dummy" if value == "dummy" else "auto"
    result.arguments += [f"--{new_name}", value]


def _graph_flag(value: str) -> str:
    try:
        config = json.loads(value)
    except ValueError as error:
        raise RefusedFlagError(f"--graph-optimization-config: not JSON: {value[:80]}") from error
    if not isinstance(config, dict):
        raise RefusedFlagError(f"--graph-optimization-config: not a JSON object: {value[:80]}")
    return "--use-cudagraph" if config.get("use_cudagraph", True) else "--no-use-cudagraph"
