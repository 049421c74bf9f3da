"""The native engine. Shapes, units and errors are those of the C++ headers in include/splitfuse."""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

__version__: str

class Error(RuntimeError): ...
class ConfigError(Error, ValueError): ...
class CheckpointError(Error): ...
class MemoryError(Error, __builtins__.MemoryError): ...
class InvalidArgument(Error, ValueError): ...
class StateError(Error): ...

class RopeConfig:
    inv_freq: list[float]
    magnitude: float
    long_from: int
    long_inv_freq: list[float]
    long_magnitude: float
    def __init__(
        self,
        *,
        inv_freq: Sequence[float] = ...,
        magnitude: float = 1.0,
        long_from: int = 0,
        long_inv_freq: Sequence[float] = ...,
        long_magnitude: float = 1.0,
    ) -> None: ...

class LayerConfig:
    window: int
    rope: int
    moe: bool
    def __init__(self, *, window: int = 0, rope: int = 0, moe: bool = False) -> None: ...

class MoeConfig:
    experts: int
    top_k: int
    intermediate_size: int
    scoring: str
    normalize: bool
    scale: float
    groups: int
    top_groups: int
    correction: bool
    router_bias: bool
    expert_bias: bool
    shared_intermediate_size: int
    shared_gate: bool
    def __init__(self, **fields: Any) -> None: ...

class ModelConfig:
    """As `ModelConfig` of splitfuse/config.h. Lists are copies: assign a new one to change them."""

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position: int
    ropes: list[RopeConfig]
    layers: list[LayerConfig]
    embed_size: int
    embed_scale: float
    embed_norm: bool
    learned_positions: int
    position_offset: int
    norm: str
    norm_place: str
    norm_bias: bool
    final_norm: bool
    norm_eps: float
    parallel: str
    residual_scale: float
    attention_scale: float
    attention_softcap: float
    alibi_slopes: list[float]
    attention_sinks: bool
    qk_norm: str
    qkv_bias: bool
    o_bias: bool
    activation: str
    gated: bool
    mlp_bias: bool
    moe: MoeConfig
    tie_embeddings: bool
    lm_head_bias: bool
    logit_scale: float
    logit_softcap: float
    eos_token_ids: list[int]
    def __init__(self, **fields: Any) -> None:
        """Any field by name. An unknown field is a TypeError."""
    def validate(self) -> None:
        """Raises ConfigError, naming the field, if this is not a model that can be run."""
    def to_json(self) -> str: ...
    @staticmethod
    def from_json(text: str) -> ModelConfig: ...

class EngineConfig:
    device: str
    dtype: str  # "float32" | "bfloat16"
    kv_dtype: str  # "auto" | "int8"
    threads: int
    pin_threads: bool
    isa: str
    quantize: str
    token_budget: int
    max_step_tokens: int
    max_sequences: int
    max_model_len: int
    block_size: int
    kv_bytes: int
    prefix_caching: bool
    def __init__(self, **fields: Any) -> None: ...

class SamplingParams:
    """The native sampling parameters; splitfuse.SamplingParams (Python) makes these."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int  # 0 .. 2**64 - 1
    sample_index: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: list[tuple[int, float]]
    stop_token_ids: list[int]
    ignore_eos: bool
    min_tokens: int
    logprobs: int  # -1: none
    prompt_logprobs: int  # -1: none
    def __init__(self, **fields: Any) -> None: ...

MAX_LOGPROBS: int

class WeightSource:
    """Hands out tensors by canonical name; made by one of the functions below."""

    @property
    def format(self) -> str:
        """What most of the matrices are stored as, or as near as EngineConfig.quantize comes: "dense", "int8" or
        "int4"."""
    def names(self) -> list[str]: ...
    def read(self, name: str) -> npt.NDArray[Any]:
        """A copy, as float32. For tests and tools."""

def open_safetensors(files: Sequence[str], names: Sequence[tuple[str, str]]) -> WeightSource:
    """`names`: (canonical name, name in the files)."""

def callback_source(
    names: Sequence[str],
    read: Callable[[str], npt.NDArray[Any] | tuple[npt.NDArray[Any], ...]],
    format: str = "dense",
) -> WeightSource:
    """Weights from Python: `read(canonical name)` gives a C-contiguous array of float32, float16, or uint16
    (the bits of bfloat16); or a matrix [n, k] as integers, as TensorView in splitfuse/weights.h has them: (codes
    int8 [n, k], scales [n, k / 32]) or (codes uint8 [n, k / 32, 16], scales and minima [n, k / 32]), scales and
    minima of float32 or float16. It is called once per tensor, in the engine's order, while loading. `format`: what
    the source says of itself."""

def read_safetensors_header(file: str) -> tuple[list[tuple[str, str, list[int], int]], dict[str, str]]:
    """([(name, dtype as written, shape, byte where its data begin)], metadata) of one file, tensors not read."""

def open_checkpoint(path: str) -> tuple[ModelConfig, WeightSource]:
    """A canonical checkpoint: the file, or the directory that `splitfuse convert` wrote."""

def write_checkpoint(
    config: ModelConfig,
    weights: WeightSource,
    dtype: str,
    file: str,
    progress: Callable[[int, int], None] | None = None,
    quantize: str = "dense",
) -> None:
    """Writes a canonical checkpoint, its matrices as "int8" or "int4" if `quantize` says so; `progress(bytes done,
    bytes in all)`."""

def canonical_names(config: ModelConfig) -> list[tuple[str, list[int]]]:
    """Every (canonical name, shape) that a model of this configuration needs."""

class SeqView:
    id: int
    known: int
    computed: int
    blocks: int
    shared: int
    priority: int
    behind: int
    @property
    def own(self) -> int: ...
    def __init__(
        self,
        id: int,
        known: int,
        computed: int,
        blocks: int = 0,
        shared: int = 0,
        priority: int = 0,
        behind: int = 0,
    ) -> None: ...

class Limits:
    max_tokens: int
    max_seqs: int
    free_blocks: int
    total_blocks: int
    block_size: int
    def __init__(
        self, max_tokens: int, max_seqs: int, free_blocks: int, total_blocks: int, block_size: int
    ) -> None: ...

class StepPlan:
    chunks: list[tuple[int, int]]  # (id, tokens)
    preempt: list[int]
    def __init__(self, chunks: Sequence[tuple[int, int]] = (), preempt: Sequence[int] = ()) -> None: ...

def plan_splitfuse(in_order: Sequence[SeqView], limits: Limits) -> StepPlan: ...

class Sampled:
    """One chosen token."""

    id: int
    token: int
    finish: str | None  # "stop" | "length" | "error"
    logprob: float
    rank: int  # 1: the most likely token, ties by lower id; 0 unless log-probabilities were asked for
    top: list[tuple[int, float]]  # (token, logprob), best first

class PromptLogprob:
    id: int
    position: int
    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]

class StepOutput:
    """A copy of what one step did; stays valid."""

    ids: npt.NDArray[np.int64]  # [sampled]
    tokens: npt.NDArray[np.int32]  # [sampled]; -1 with finish "error"
    finish: npt.NDArray[np.uint8]  # [sampled]; 0 none, 1 stop, 2 length, 3 error
    sampled: list[Sampled]  # the same rows as objects, with log-probabilities; made on access
    prompt: list[PromptLogprob]
    chunks: list[tuple[int, int]]  # (id, tokens) that ran
    preempted: list[int]
    decode_tokens: int
    prefill_tokens: int
    cached_tokens: int
    host_us: float
    forward_us: float
    barriers: int  # how often all threads waited for each other

class Capacity:
    total_blocks: int
    free_blocks: int
    cached_blocks: int
    used_blocks: int
    running: int
    waiting: int
    token_budget: int
    max_step_tokens: int
    max_sequences: int
    max_model_len: int
    block_size: int
    prefix_queries: int
    prefix_hits: int

class Progress:
    prompt: int
    known: int
    computed: int
    cached: int
    blocks: int
    preemptions: int
    finish: str | None

class MemoryPlan:
    weights: int
    kv_pool: int
    workspace: int
    host: int
    available: int
    kv_bytes_per_token: int
    blocks: int
    max_model_len: int
    token_budget: int
    max_step_tokens: int
    total: int
    def __str__(self) -> str: ...

class Engine:
    """One owner thread: a call from a second thread while one runs raises StateError. step() releases the GIL."""

    def __init__(
        self,
        model: ModelConfig,
        weights: WeightSource,
        config: EngineConfig | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None: ...
    def put(
        self,
        id: int,
        tokens: Sequence[int] | npt.NDArray[Any],
        params: SamplingParams | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Queues a sequence. Raises InvalidArgument with the reason if it is refused."""
    def step(self, plan: StepPlan | None = None) -> StepOutput: ...
    def query(self, id: int | None = None) -> Any:
        """Capacity without an id, Progress with one."""
    def view(self) -> tuple[list[SeqView], Limits]: ...
    def has_work(self) -> bool: ...
    def flush(self, id: int) -> None: ...
    def close(self) -> None: ...
    def describe(self) -> str: ...
    def budget_curve(self) -> list[tuple[int, float]]:
        """(tokens of a forward, tokens a second) that the budget was chosen by; empty if it was given."""
    @property
    def memory_plan(self) -> MemoryPlan: ...
    @property
    def model_config(self) -> ModelConfig: ...

def plan_memory(model: ModelConfig, config: EngineConfig) -> MemoryPlan: ...
def chosen_kernels(config: EngineConfig) -> list[tuple[str, str, str]]:
    """(operation, instruction set, number formats and tile) of the kernels that an engine would run."""

def rope_frequencies(theta: float, dims: int) -> list[float]:
    """theta^(-2i / dims), i = 0 .. dims / 2 - 1, in float32."""

def cpu_isas() -> list[str]:
    """The rungs of the ISA ladder this machine can run, lowest first."""

def usable_cores() -> int: ...

bench: ModuleType  # python/bindings/bench.cc: roofline, linear_us, attention_us, barrier_us
