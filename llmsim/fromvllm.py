"""A `vllm serve` command line as a scenario.

Reads what people paste: environment assignments, `docker run … vllm/vllm-openai …`, `python -m vllm.entrypoints…`,
line continuations, `--flag value` and `--flag=value`, underscores for dashes, unique prefixes (argparse takes them),
`--no-…` negatives, JSON and dotted configuration (`-cc.cudagraph_mode=NONE`), 32k and 32K. Flags are those of vLLM 0.25
(engine/arg_utils.py, entrypoints/openai/cli_args.py).

Every flag ends in one of three places: a scenario field; `ignored`, because it does not change when tokens come out;
`not_modelled`, because it does and llmsim has no model of it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from llmsim.hardware import find_model
from llmsim.scenario import Scenario
from llmsim.scenario_file import human_int
from llmsim.vllm_flags import (
    CHANGES_NOTHING,
    CHANGES_THE_SCHEDULE,
    INTEGERS,
    NUMBERS,
    QUANTIZATION_NAMES,
    SHORT,
    SWITCHES,
    TAKES_SEVERAL,
    TEXTS,
    VALUELESS,
)

CUDAGRAPH_MODES = {
    "NONE": "none",
    "PIECEWISE": "piecewise",
    "FULL_DECODE_ONLY": "full_decode_only",
    "FULL_AND_PIECEWISE": "full_and_piecewise",
}
OPTIMIZATION_LEVELS = {"0": "none", "1": "piecewise", "2": "full_and_piecewise", "3": "full_and_piecewise"}
KNOWN = sorted({*INTEGERS, *NUMBERS, *TEXTS, *SWITCHES, *CHANGES_NOTHING, *CHANGES_THE_SCHEDULE})


@dataclass
class Translation:
    """What a command line says about the scenario; `fields` lacks the GPU, which no vLLM command names."""

    fields: dict[str, Any] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    not_modelled: list[str] = field(default_factory=list)


def translate(command: str | list[str]) -> Translation:
    words = _serve_arguments(command)
    model, flags = _split(words)
    out = Translation()
    for name, value in flags:
        if name == "model":
            if model is not None and model != value:
                raise ValueError(f"vllm serve names two models, {model!r} and {value!r}: keep one")
            model = value
        else:
            _place(out, name, value)
    if model is None:
        raise ValueError("vllm serve without a model: write vllm serve MODEL, e.g. meta-llama/Llama-3.1-8B-Instruct")
    _add_model(out, model)
    _partial_prefills(out)
    return out


def as_flags(fields: dict[str, Any]) -> list[str]:
    """The words of `llmsim replay` that set these fields."""
    names = {"tensor_parallel": "tensor-parallel-size", "reserve_full_isl": "scheduler-reserve-full-isl"}
    words: list[str] = []
    for name, value in fields.items():
        flag = names.get(name, name.replace("_", "-"))
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


# ---- words ----------------------------------------------------------------------------------------------------------


def _serve_arguments(command: str | list[str]) -> list[str]:
    """The words after `vllm serve`, up to the end of that shell command."""
    if isinstance(command, str):
        try:
            words = shlex.split(re.sub(r"\\\r?\n", " ", command), comments=True)
        except ValueError as error:
            raise ValueError(f"the vllm command has unbalanced quotes ({error}): close them") from error
    else:
        words = command
    start = _start(words)
    for end in range(start, len(words)):
        if re.fullmatch(r"&&?|\|\|?|;|\d?>>?.*|&>.*|<", words[end]):
            return words[start:end]
    return words[start:]


def _start(words: list[str]) -> int:
    for index, word in enumerate(words):
        follows = words[index + 1] if index + 1 < len(words) else ""
        if re.fullmatch(r"(.*/)?vllm", word) and follows == "serve":
            return index + 2
        if re.search(r"(^|/)vllm-openai(:|@|$)", word) or word == "vllm.entrypoints.openai.api_server":
            return index + 1
    shown = " ".join(words[:4])
    raise ValueError(
        f"no 'vllm serve' in {shown!r}: paste the whole command, e.g. 'vllm serve MODEL --max-num-seqs 256'"
    )


def _split(words: list[str]) -> tuple[str | None, list[tuple[str, str | None]]]:
    """The positional model and the flags, each by its long name without dashes, with its value if it has one."""
    model: str | None = None
    flags: list[tuple[str, str | None]] = []
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not _is_flag(word):
            if model is not None:
                raise ValueError(f"vllm serve: {word!r} follows no flag and the model is already {model!r}: remove it")
            model = word
            continue
        name, value = _name_and_value(word)
        if value is None:
            taken = _values_after(name, words, index)
            index += len(taken)
            value = " ".join(taken) if taken else None
        flags.append((name, value))
    return model, flags


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _name_and_value(word: str) -> tuple[str, str | None]:
    level = re.fullmatch(r"-O=?(\d)", word)
    if level:
        return "optimization-level", level[1]
    flag, equals, value = word.partition("=")
    stem, dot, rest = flag.partition(".")
    name = stem[2:].replace("_", "-") if stem.startswith("--") else SHORT.get(stem, stem)
    name = _complete(name)
    return name + dot + rest, value if equals else None


def _complete(name: str) -> str:
    """The one known flag that begins with `name`, as argparse has it; `name` itself if there is none or several."""
    if name in KNOWN or name == "model" or _positive(name) in SWITCHES:
        return name
    begins = [known for known in (*KNOWN, *(f"no-{switch}" for switch in SWITCHES)) if known.startswith(name)]
    return begins[0] if len(begins) == 1 else name


def _positive(name: str) -> str:
    return name.removeprefix("no-")


def _values_after(name: str, words: list[str], index: int) -> list[str]:
    following: list[str] = []
    for word in words[index:]:
        if _is_flag(word):
            break
        following.append(word)
    if _positive(name) in SWITCHES:  # old releases had `--enable-chunked-prefill False`
        return following[:1] if following and following[0].lower() in ("true", "false") else []
    if _positive(name) in VALUELESS:
        return []
    return following if name in TAKES_SEVERAL else following[:1]


# ---- meaning --------------------------------------------------------------------------------------------------------


def _place(out: Translation, name: str, value: str | None) -> None:
    stem = name.partition(".")[0]
    shown = f"--{name}" + (f" {value}" if value is not None else "")
    if _positive(stem) in SWITCHES:
        out.fields[SWITCHES[_positive(stem)]] = _switch(name, value)
    elif stem in ("compilation-config", "optimization-level", "enforce-eager"):
        _cudagraph(out, name, value, shown)
    elif stem in INTEGERS or stem in NUMBERS or stem in TEXTS:
        _field(out, stem, value, shown)
    elif _positive(stem) in CHANGES_THE_SCHEDULE:
        reason, harmless = CHANGES_THE_SCHEDULE[_positive(stem)]
        if stem.startswith("no-") or value == harmless:
            out.ignored.append(f"{shown}: vLLM's default")
        else:
            out.not_modelled.append(f"{shown}: {reason}")
    elif _positive(stem) in CHANGES_NOTHING:
        out.ignored.append(f"{shown}: {CHANGES_NOTHING[_positive(stem)]}")
    else:
        close = get_close_matches(stem, KNOWN, n=1)
        hint = f"; did you mean --{close[0]}?" if close else ""
        out.not_modelled.append(f"{shown}: not a vLLM flag that llmsim knows{hint}")


def _switch(name: str, value: str | None) -> bool:
    if value is None:
        return not name.startswith("no-")
    if value.lower() not in ("true", "false") or name.startswith("no-"):
        raise ValueError(f"vllm serve: --{name} {value!r} is neither true nor false: write --{name} alone")
    return value.lower() == "true"


def _field(out: Translation, name: str, value: str | None, shown: str) -> None:
    if value is None:
        raise ValueError(f"vllm serve: --{name} has no value: give one")
    if name == "max-model-len" and value in ("auto", "-1"):
        out.not_modelled.append(f"{shown}: llmsim does not shorten the context to what fits; it takes the model's own")
    elif name == "quantization" and value not in QUANTIZATION_NAMES:
        out.not_modelled.append(
            f"{shown}: no element size is known for it; weights are taken as the model publishes them"
        )
    elif name == "quantization":
        out.fields["quantization"] = QUANTIZATION_NAMES[value]
    elif name in TEXTS:
        out.fields[TEXTS[name]] = value
    else:
        convert: Callable[[str], int | float] = human_int if name in INTEGERS else float
        try:
            out.fields[{**INTEGERS, **NUMBERS}[name]] = convert(value)
        except ValueError as error:
            raise ValueError(f"vllm serve: --{name} {value!r} is not a number: give one such as 256 or 32k") from error


def _cudagraph(out: Translation, name: str, value: str | None, shown: str) -> None:
    if name == "enforce-eager":
        out.fields["cudagraph"] = "none"
    elif name == "optimization-level":
        if value not in OPTIMIZATION_LEVELS:
            raise ValueError(f"vllm serve: {shown} is not one of -O0, -O1, -O2, -O3: give one of them")
        out.fields.setdefault("cudagraph", OPTIMIZATION_LEVELS[value])
    else:
        for key, setting in _compilation(name, value).items():
            mode = str(setting).upper().rpartition(".")[2]
            if key == "cudagraph_mode" and mode in CUDAGRAPH_MODES:
                out.fields["cudagraph"] = CUDAGRAPH_MODES[mode]
            elif key.startswith("cudagraph") or key in (
                "max_cudagraph_capture_size",
                "use_cudagraph",
                "full_cuda_graph",
            ):
                out.not_modelled.append(f"--compilation-config {key}={setting}: llmsim has vLLM's default graphs")
            else:
                out.ignored.append(f"--compilation-config {key}={setting}: llmsim takes compiled kernels as measured")


def _compilation(name: str, value: str | None) -> dict[str, Any]:
    if value is None:
        raise ValueError(f"vllm serve: --{name} has no value: give one")
    dotted = name.partition(".")[2]
    if dotted:
        return {dotted: value}
    if value.isdigit():
        return {"mode": int(value)}
    try:
        config = json.loads(value)
    except ValueError as error:
        raise ValueError(f"vllm serve: --{name} {value!r} is not JSON ({error}): quote it with '…'") from error
    if not isinstance(config, dict):
        raise ValueError(f'vllm serve: --{name} {value!r} is not a JSON object: write \'{{"cudagraph_mode": "NONE"}}\'')
    return config


def _add_model(out: Translation, given: str) -> None:
    """Hub names carry a weight format and a tuning in their name; the shapes are those of the base model."""
    lower = given.lower()
    found = re.search(r"fp8|awq|gptq|w4a16|w8a8|int4|int8|bnb-4bit|mxfp4", lower.rpartition("/")[2])
    try:
        name = find_model(given).name if not given.endswith(".json") else given
        out.fields = {"model": name, **out.fields}
        return
    except (ValueError, FileNotFoundError) as error:
        if found is None:
            raise ValueError(f"vllm serve {given}: {error}, or give the path of its config.json") from error
    stem = re.sub(r"[-_.](quantized[-_.])?(fp8|awq|gptq|w4a16|w8a8|int4|int8|bnb-4bit|mxfp4).*$", "", lower)
    out.fields = {"model": find_model(stem).name, **out.fields}
    out.fields.setdefault("quantization", QUANTIZATION_NAMES[found[0]])


def _partial_prefills(out: Translation) -> None:
    """All that V1 makes of max_num_partial_prefills > 1 is a chunk cap of 4 % of the context (config/scheduler.py)."""
    partial = out.fields.pop("max_num_partial_prefills", 1)
    if partial > 1 and not out.fields.get("long_prefill_token_threshold"):
        context = out.fields.get("max_model_len") or find_model(out.fields["model"]).max_context_tokens
        out.fields["long_prefill_token_threshold"] = int(0.04 * context)


def check(fields: dict[str, Any], gpu: str | None) -> Scenario:
    """The scenario of these fields, refused where vLLM would refuse to start."""
    scenario = Scenario.from_dict({**fields, "gpu": gpu or "unnamed"}, source="vllm serve")
    return scenario.resolved() if gpu else scenario
