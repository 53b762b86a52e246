"""The shape of a decoder model, and the weights, bytes and operations that follow from it.

Weights of one layer, in elements (H hidden, h heads, g KV heads, d head size, I width of a gated MLP, E experts):

    attention   H (h + 2 g) d + h d H            MLA: H q + q h (n + r) + H (c + r) + c h (n + v) + h v H
                                                 (q, c latent ranks of query and KV; n, r, v head
                                                 sizes without RoPE, with it, and of values)
    MLP         3 H I                            MoE: E times 3 H I' + router H E + shared experts 3 H I"
    KV/token    2 g d                            MLA: c + r, shared by all heads

Under tensor parallelism heads, MLP widths and the vocabulary are split; KV heads are repeated when there are fewer of
them than ranks, and norms, routers and MLA's latent projections stay whole on every rank. Quantised formats cover the
matmul weights of the layers (mxfp4: of MoE models the experts only); embeddings, LM head and norms keep the 2-byte
dtype. A batch of t tokens reaches E (1 - (1 - k/E)^t) distinct experts if each token picks k of E evenly. Multimodal
towers are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes per element. 4-bit formats carry scales: AWQ and GPTQ a 2-byte scale and a 4-bit zero point per group of 128,
# the OCP microscaling format a 1-byte scale per 32.
ELEMENT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "fp8": 1.0,
    "int8": 1.0,
    "int4": 0.5 + 2.5 / 128,
    "mxfp4": 0.5 + 1 / 32,
}
# Bits of a number of a quantised KV cache; each key and value vector of each head and token has a scale and a zero
# point of 2 bytes each beside it (asymmetric, per head and token: LMDeploy, docs/en/quantization/kv_quant.md). fp8 has
# one scale for a whole tensor (vLLM): no bytes a token.
KV_BITS = {"int8": 8, "int4": 4}
KV_SCALE_BYTES = 4
_DTYPE_SPELLINGS = {
    "half": "float16",
    "fp16": "float16",
    "bf16": "bfloat16",
    "float": "float32",
    "fp8_e4m3": "fp8",
    "fp8_e5m2": "fp8",
    "awq": "int4",
    "awq_marlin": "int4",
    "gptq": "int4",
    "gptq_marlin": "int4",
}


def dtype_name(dtype: str) -> str:
    """The dtype in `ELEMENT_BYTES` that an engine's spelling stands for ("fp8_e4m3" is "fp8", "awq" is "int4")."""
    name = _DTYPE_SPELLINGS.get(dtype, dtype)
    if name not in ELEMENT_BYTES:
        raise ValueError(f"unknown dtype {dtype!r}. Use one of {', '.join(ELEMENT_BYTES)}")
    return name


@dataclass(frozen=True)
class Model:
    name: str
    architecture: str
    layers: int
    hidden: int
    intermediate: int  # width of the dense MLP; 0 if every layer is MoE
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_embeddings: bool
    max_context_tokens: int
    source: str
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    shared_intermediate: int = 0  # all shared experts together
    moe_layers: int = 0
    q_lora_rank: int = 0  # 0: the query is projected directly
    kv_lora_rank: int = 0  # above 0: multi-head latent attention (MLA)
    rope_head_dim: int = 0  # MLA only, as are the next two
    nope_head_dim: int = 0
    v_head_dim: int = 0
    sliding_window: int = 0  # tokens
    sliding_layers: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    expert_bias: bool = False
    qk_norm: bool = False
    norms_per_layer: int = 2
    quantization: str | None = None  # format of the published weights, if not 2-byte

    @property
    def mla(self) -> bool:
        return self.kv_lora_rank > 0

    @property
    def full_layers(self) -> int:
        """Layers whose attention sees the whole context."""
        return self.layers - self.sliding_layers

    def tensor_parallel_sizes(self, most: int = 8) -> list[int]:
        return [tp for tp in range(1, most + 1) if self._splits(tp)]

    def _splits(self, tp: int) -> bool:
        widths = (self.heads, self.intermediate, self.expert_intermediate, self.shared_intermediate)
        repeats = tp % self.kv_heads == 0 if tp > self.kv_heads else self.kv_heads % tp == 0
        return repeats and all(width % tp == 0 for width in widths)

    def check_tensor_parallel(self, tp: int) -> None:
        if tp < 1 or not self._splits(tp):
            sizes = ", ".join(str(size) for size in self.tensor_parallel_sizes(max(8, min(tp, 64))))
            raise ValueError(
                f"tensor_parallel={tp} does not divide the {self.heads} heads, {self.kv_heads} KV heads and MLP widths "
                f"of {self.name}. Use one of {sizes}"
            )

    def layer_linears(self, tp: int = 1) -> dict[str, tuple[int, int]]:
        """(n outputs, k inputs) of a dense layer's linear layers on one rank, in the order they run in.

        ValueError: a `tp` that does not divide the model.
        """
        self.check_tensor_parallel(tp)
        heads, width = self.heads // tp, self.intermediate // tp
        return {
            "qkv": ((heads + 2 * self._kv_heads_on_rank(tp)) * self.head_dim, self.hidden),
            "output": (self.hidden, heads * self.head_dim),
            "gate_up": (2 * width, self.hidden),  # both halves in one product, as engines run it
            "down": (self.hidden, width),
        }

    # ---- elements on one rank ---------------------------------------------------------------------------------

    def _kv_heads_on_rank(self, tp: int) -> int:
        return max(1, self.kv_heads // tp)

    def attention_params(self, tp: int = 1) -> float:
        heads = self.heads / tp
        if not self.mla:
            kv = self._kv_heads_on_rank(tp)
            return self.hidden * self.head_dim * (2 * heads + 2 * kv)
        query_in = self.q_lora_rank or self.hidden
        return (
            self.hidden * self.q_lora_rank
            + query_in * heads * (self.nope_head_dim + self.rope_head_dim)
            + self.hidden * (self.kv_lora_rank + self.rope_head_dim)
            + self.kv_lora_rank * heads * (self.nope_head_dim + self.v_head_dim)
            + heads * self.v_head_dim * self.hidden
        )

    def _mlp_params(self, width: float) -> float:
        return 3 * self.hidden * width

    @property
    def mlp_width(self) -> int:
        """Intermediate elements of one token in a layer, the wider kind of layer standing for all."""
        return max(self.intermediate, self.experts_per_token * self.expert_intermediate + self.shared_intermediate)

    @property
    def dense_layers(self) -> int:
        return self.layers - self.moe_layers

    def dense_linear_params(self, tp: int = 1) -> float:
        """Matmul weights that every token passes: attention, dense MLPs, shared experts, routers; no LM head."""
        moe = self._mlp_params(self.shared_intermediate / tp) + self.hidden * self.experts
        return (
            self.layers * self.attention_params(tp)
            + self.dense_layers * self._mlp_params(self.intermediate / tp)
            + self.moe_layers * moe
        )

    def expert_params(self, tp: int = 1) -> float:
        """One expert, in all MoE layers together."""
        return self.moe_layers * self._mlp_params(self.expert_intermediate / tp)

    def distinct_experts(self, tokens: float) -> float:
        """Experts of a layer that a batch of `tokens` is expected to reach."""
        if not self.experts:
            return 0.0
        return float(self.experts * (1 - (1 - self.experts_per_token / self.experts) ** tokens))

    @property
    def linear_params(self) -> int:
        """Matmul weights one token passes through, without LM head (MoE: its own experts only)."""
        return round(self.dense_linear_params() + self.experts_per_token * self.expert_params())

    @property
    def lm_head_params(self) -> int:
        return self.vocab * self.hidden

    @property
    def embedding_params(self) -> int:
        """Both tables: the input embedding, and the LM head unless it is the same one."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)

    @property
    def _small_params(self) -> int:
        """Norms and biases, whole on every rank; under 0.1 % of any model here."""
        norms = self.norms_per_layer * self.hidden
        if self.mla:
            norms += self.q_lora_rank + self.kv_lora_rank
        norms += 2 * self.head_dim if self.qk_norm else 0
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim if self.qkv_bias else 0
        out = self.hidden if self.out_bias else 0
        experts = self.experts * (2 * self.expert_intermediate + self.hidden + 1) if self.expert_bias else 0
        return self.layers * (norms + qkv + out) + self.moe_layers * experts + self.hidden

    @property
    def params(self) -> int:
        """All weights."""
        layers = self.dense_linear_params() + self.experts * self.expert_params()
        return round(layers) + self.embedding_params + self._small_params

    @property
    def active_params(self) -> int:
        """Weights one token passes through, with both embedding tables."""
        return self.linear_params + self.embedding_params + self._small_params

    # ---- bytes ------------------------------------------------------------------------------------------------

    def weight_format(self, dtype: str) -> str:
        """How matmul weights are stored: a model published quantised stays so unless `dtype` names another format."""
        name = dtype_name(dtype)
        return self.quantization if self.quantization and name in ("bfloat16", "float16") else name

    def linear_bytes(self, dtype: str, tp: int = 1, experts: float | None = None) -> float:
        """Bytes of the layers' matmul weights on a rank, with `experts` distinct experts a layer (None: all)."""
        stored = self.weight_format(dtype)
        count = self.experts if experts is None else experts
        dense = "bfloat16" if stored == "mxfp4" and self.experts else stored
        return (
            self.dense_linear_params(tp) * ELEMENT_BYTES[dense] + count * self.expert_params(tp) * ELEMENT_BYTES[stored]
        )

    def plain_bytes(self, dtype: str) -> float:
        """Bytes per element of what is never quantised: embeddings, LM head, norms, activations."""
        return 4.0 if dtype_name(dtype) == "float32" else 2.0

    def weight_bytes(self, dtype: str, tp: int = 1) -> int:
        """All weights one rank holds."""
        self.check_tensor_parallel(tp)
        rest = self.embedding_params / tp + self._small_params
        return round(self.linear_bytes(dtype, tp) + rest * self.plain_bytes(dtype))

    def kv_elements_per_token_layer(self, tp: int = 1) -> int:
        if self.mla:
            return self.kv_lora_rank + self.rope_head_dim  # one latent vector, the same on every rank
        return 2 * self._kv_heads_on_rank(tp) * self.head_dim

    def kv_bytes_per_token(self, kv_dtype: str, tp: int = 1) -> int:
        """KV bytes one token keeps on a rank, in all layers, whether or not a sliding window could drop it."""
        self.check_tensor_parallel(tp)
        return round(self.layers * self.kv_layer_bytes(kv_dtype, tp))

    def kv_layer_bytes(self, kv_dtype: str, tp: int = 1) -> float:
        name = "bfloat16" if kv_dtype == "auto" else dtype_name(kv_dtype)
        elements = self.kv_elements_per_token_layer(tp)
        if name in KV_BITS:
            vectors = 1 if self.mla else 2 * self._kv_heads_on_rank(tp)
            return elements * KV_BITS[name] / 8 + vectors * KV_SCALE_BYTES
        return elements * ELEMENT_BYTES[name]

    # ---- operations -------------------------------------------------------------------------------------------

    @property
    def linear_flops_per_token(self) -> int:
        return 2 * self.linear_params

    @property
    def layer_flops_per_pair(self) -> int:
        """Attention of one (query, key) pair in one layer: QK^T and PV, a multiply and an add each."""
        if self.mla:
            return 2 * self.heads * (self.nope_head_dim + self.rope_head_dim + self.v_head_dim)
        return 4 * self.heads * self.head_dim

    @property
    def decode_flops_per_pair(self) -> int:
        """The same for a decoding token. MLA then attends in the latent space, where every head reads all of c + r."""
        if self.mla:
            return 2 * self.heads * (2 * self.kv_lora_rank + self.rope_head_dim)
        return self.layer_flops_per_pair

    @property
    def attention_flops_per_pair(self) -> int:
        return self.layers * self.layer_flops_per_pair
