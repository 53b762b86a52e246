"""What model and machine is recorded: a config.json for vLLM, and the names under which llmsim finds both again."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from llmsim import __version__
from llmsim.hardware import find_gpu, find_model, gpu_names
from llmsim.model import Model

# architecture -> keys of its config.json that the shapes do not give (as published; none changes how long a step takes)
FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0},
    "MistralForCausalLM": {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "Gemma2ForCausalLM": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "Gemma3ForCausalLM": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 256,
    },
}
# nvidia-smi's name where it does not say which board of llmsim's list it is
BOARDS = {"NVIDIA H200": "h200-sxm", "NVIDIA H100 80GB HBM3": "h100-sxm"}


def model_config(model: str | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(config.json, what the recording says of the model) of a known name, a config.json's path, or its content."""
    if isinstance(model, dict):
        return model, str(model.get("_name_or_path") or "given config")
    path = Path(model) / "config.json" if (Path(model) / "config.json").is_file() else Path(model)
    shapes = find_model(model)  # says what is wrong with the file or name
    if path.suffix == ".json" or path.is_file():
        return json.loads(path.read_text(encoding="utf-8")), shapes.name
    return published_config(shapes), shapes.name


def published_config(model: Model) -> dict[str, Any]:
    if model.architecture not in FAMILIES or model.quantization or model.experts:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model={model.name}: a config.json can be made of dense {known}. Give --model CONFIG.json")
    return FAMILIES[model.architecture] | {
        "architectures": [model.architecture],
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "tie_word_embeddings": model.tied_embeddings,
        "max_position_embeddings": model.max_context_tokens,
        "sliding_window": model.sliding_window or None,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def vocabulary(config: dict[str, Any]) -> int:
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int) or size < 200:
        raise ValueError(f"config.json: vocab_size={size!r}. Prompts need the number of tokens to draw from")
    return size


def gpu_text(name: str, given: str | None = None) -> str:
    """nvidia-smi's name, with llmsim's if it does not follow from that."""
    text = name.lower().replace("_", "-")
    named = [gpu for gpu in gpu_names() if all(part in text for part in gpu.split("-"))]
    board = find_gpu(given).name if given else BOARDS.get(name)
    return name if board is None or named == [board] else f"{name} ({board})"


def nvidia_smi() -> dict[str, Any]:
    """Name, memory and driver of the first GPU, asked without starting CUDA here: the engine's processes are forked."""
    asked = "name,memory.total,driver_version,power.limit"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        raise ValueError("no NVIDIA GPU: nvidia-smi does not answer. Record on the machine that has one") from None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    if not rows or len(rows[0]) < 3:
        raise ValueError(f"no NVIDIA GPU: nvidia-smi says {done.stdout.strip()!r}")
    name, memory_mib, driver = rows[0][:3]
    return {"name": name, "memory_mib": int(float(memory_mib)), "driver": driver, "gpus": len(rows)}


def cpu_text() -> str:
    import os

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {cores} cores usable"


def recorder_version() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"llmsim {__version__}, recorder {digest.hexdigest()[:12]}"
