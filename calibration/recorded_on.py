"""The recordings of this repository: which machine each is of, and what each profile is carried to in them.

Folders of one machine stand together. Where it is not known whether two are (the H200 of the tight and that of the
prefix loads), they stand apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHIPPED, TESTED = ROOT / "calibration" / "recordings", ROOT / "tests" / "data" / "recordings"
H200, H100 = "vllm-0.25.1_h200-sxm_llama-3.1-8b_bf16", "vllm-0.25.1_h100-sxm_llama-3.1-8b_bf16"


@dataclass(frozen=True)
class Recorded:
    """Of one profile: folders by machine, and those of models, precisions and sizes it is carried to."""

    machines: tuple[tuple[Path, ...], ...]
    carried: tuple[Path, ...] = ()


RECORDED = {
    "h200-sxm": Recorded(
        machines=(
            (SHIPPED / H200, SHIPPED / f"{H200}_tight"),
            (SHIPPED / f"{H200}_prefix", SHIPPED / f"{H200}_preempt"),
            (SHIPPED / f"{H200}_second-machine",),
            (SHIPPED / f"{H200}_capacity",),
            (
                SHIPPED / f"{H200}_fourth-machine",
                SHIPPED / f"{H200}_eager",
                SHIPPED / f"{H200}_sync",
                SHIPPED / "vllm-0.25.1_h200-sxm_llama-3.1-8b_kv-fp8",
            ),
            (SHIPPED / f"{H200}_fifth-machine", SHIPPED / f"{H200}_fifth-machine_eager"),
            (SHIPPED / f"{H200}_sixth-machine_batched-2048", SHIPPED / f"{H200}_sixth-machine_preempt"),
            (
                SHIPPED / f"{H200}_eighth-machine",
                SHIPPED / "vllm-0.25.1_h200-sxm_llama-3.1-8b_kv-fp8_eighth-machine",
            ),
            (SHIPPED / f"{H200}_tenth-machine_seqs-1024",),
        ),
        carried=(
            SHIPPED / f"{H200}_tp2",
            SHIPPED / "vllm-0.25.1_h200-sxm_gemma-2-9b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_gemma-2-27b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_gemma-3-12b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_llama-3.1-8b_fp8",
            SHIPPED / "vllm-0.25.1_h200-sxm_llama-3.1-8b_fp8_fifth-machine",
            SHIPPED / "vllm-0.25.1_h200-sxm_llama-3.2-1b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_llama-3.2-3b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_mistral-nemo-12b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_mistral-small-24b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen2.5-1.5b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen2.5-14b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen2.5-14b_bf16_tp2",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen2.5-14b_fp8",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen2.5-32b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen2.5-32b_fp8",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen2.5-3b_fp16",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen2.5-7b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen3-1.7b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen3-14b_bf16_batched-4096",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen3-32b_bf16",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen3-4b_bf16_batched-16384",
            SHIPPED / "vllm-0.25.1_h200-sxm_qwen3-8b_bf16",
        ),
    ),
    "h100-sxm": Recorded(machines=((TESTED / H100,), (TESTED / f"{H100}_second-machine",))),
}


def placed() -> list[Path]:
    """All of them."""
    return [path for held in RECORDED.values() for group in (*held.machines, held.carried) for path in group]
