"""Every option of a job, by section. Names follow torchtitan's TOML where it has one; units come first.

Plain data, no torch. `load.py` checks types and keys, `check.py` the rules that join sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class JobInfo:
    run_dir: str = "runs/run"
    """Folder that receives everything this run writes; refused when used, unless `--resume`."""
    description: str = ""
    """One line for the report."""


@dataclass(kw_only=True)
class Model:
    name: str = "nanochat"
    """Architecture in the registry, such as `qwen3`; `nanovl models list` prints all."""
    flavor: str = ""
    """Named size of the architecture, such as `0.6b`; empty = the family's default size."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Every other key of `[model]`: fields of the family's config, such as `depth` or `blocks.full.mixer.head_dim`."""


@dataclass(kw_only=True)
class Tokenizer:
    path: str = ""
    """Folder with a tokenizer.json; empty = that of `checkpoint.initial_load_path`, or without those weights one
    that is trained on the training text. The run folder keeps it."""
    vocab_size: int = 32768
    """Entries, the nine special tokens included; used when a tokenizer is trained."""
    train_characters: int = 2_000_000_000
    """Characters of training text a new tokenizer sees at most."""
    document_characters: int = 10_000
    """Characters taken of one document at most, so that long files do not rule the merges."""
    trainer: Literal["rustbpe", "tokenizers"] = "rustbpe"
    """Library that learns the merges; both write the same file format."""


@dataclass(kw_only=True)
class Source:
    kind: Literal["stdlib", "text", "jsonl", "parquet", "tokens"] = "text"
    """`stdlib`: Python's own library; `text`: one document a file; `jsonl`(.gz): one a line; `parquet`: one a row;
    `tokens`: shards written by `nanovl data pack`."""
    path: str = ""
    """File or folder; every file of the kind below it is read, in the order of its relative path."""
    column: str = "text"
    """JSON key or parquet column that holds the text."""
    weight: float = 1.0
    """Share of the tokens, relative to the other sources."""
    holdout: float = 0.0
    """Fraction of files kept for validation, chosen by a hash of the relative path: never by what else is on disk. In
    `validation.sources`: above 0 reads only those, 0 reads every file."""


@dataclass(kw_only=True)
class Data:
    sources: list[Source] = field(default_factory=list)
    """Where documents come from; mixed by weight."""
    packing: Literal["best_fit", "concat"] = "best_fit"
    """`best_fit`: every row starts with a document and holds whole ones where they fit; `concat`: one stream, cut
    every row."""
    overflow: Literal["crop", "pad", "split"] = "crop"
    """What fills the end of a best-fit row: another document's beginning, its rest thrown away (`crop`) or kept for a
    later row (`split`); or padding without loss (`pad`)."""
    buffer_documents: int = 64
    """Documents each lane holds to choose from in best-fit packing."""
    cross_document_attention: bool = False
    """Let attention see the row's earlier documents (nanochat's habit)."""
    shuffle: bool = True
    """New document order each epoch, from `debug.seed`."""
    prefetch_batches: int = 4
    """Batches made ahead in a background thread; 0 = in the training loop."""


@dataclass(kw_only=True)
class Training:
    steps: int = 0
    """Optimizer steps; 0 = as many as `tokens_per_parameter` needs."""
    tokens_per_parameter: float = 12.0
    """Horizon when `steps` is 0: tokens per matrix and output-head parameter (nanochat's measure)."""
    seq_len: int = 2048
    """Tokens a row."""
    local_batch_size: int = 8
    """Rows a rank computes at once, the rest of its share being gradient accumulation; 0 = all of its rows."""
    global_batch_size: int = 0
    """Rows an optimizer step; 0 = chosen by `optimizer.scaling`, or one local batch a rank."""
    max_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 = only measure it."""
    max_skipped_steps: int = 10
    """Steps in a row without a finite loss or gradient norm that are skipped, on all ranks; one more ends the run."""
    mixed_precision_param: Literal["auto", "bfloat16", "float32"] = "auto"
    """Dtype of compute and of gathered weights; masters stay float32. `auto`: the fastest known here."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which gradients are summed over ranks."""
    loss_chunk_tokens: int = 0
    """Tokens whose logits exist at one time in the loss; 0 = what suits the device."""
    gc_freq: int = 50
    """Steps between garbage collections, made at the same step on every rank; 0 = Python's own rhythm."""


@dataclass(kw_only=True)
class OptimizerGroup:
    match: str
    """Regular expression over the whole parameter name; the first group that matches takes the parameter."""
    kind: Literal["adamw", "muon"] = "adamw"
    """Update rule; muon takes matrices only."""
    lr: float | None = None
    """Peak learning rate; none = `optimizer.lr`."""
    beta1: float | None = None
    """AdamW's first moment; none = `optimizer.beta1`. Muon groups have none: their momentum is `optimizer.muon`'s."""
    beta2: float | None = None
    """AdamW's second moment, or NorMuon's; none = `optimizer.beta2` (muon: 0.9)."""
    weight_decay: float | None = None
    """Decay per unit of learning rate; none = `optimizer.weight_decay`. nanochat scaling fits muon's to the size."""
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the decay falls to 0 over the run."""
    scale_with_width: bool = False
    """Under `optimizer.scaling = "nanochat"`: times (hidden_size / 768)^-0.5."""
    scale_with_batch: bool = True
    """Under `optimizer.scaling = "nanochat"`: times sqrt(batch tokens / 2^19)."""


@dataclass(kw_only=True)
class Muon:
    momentum: float = 0.97
    """Nesterov momentum after its warm-up."""
    momentum_start: float = 0.85
    """Momentum at step 0."""
    momentum_warmup_steps: int = 400
    """Steps from `momentum_start` to `momentum`."""
    momentum_end: float = 0.90
    """Momentum reached at the end of the learning-rate warm-down."""
    orthogonalization: Literal["polar_express", "newton_schulz"] = "polar_express"
    """Iteration to the nearest orthogonal matrix: arXiv:2505.16932, or Muon's first quintic."""
    iterations: int = 5
    """Steps of that iteration."""
    row_equilibration: bool = True
    """MuonEq: rescale each row to the mean row norm first (arXiv:2603.28254)."""
    renormalize: bool = True
    """Muon+: snap the Frobenius norm to that of an orthogonal matrix (arXiv:2602.21545)."""
    variance_reduction: bool = True
    """NorMuon: even out the update per row or column by its second moment (arXiv:2510.05491)."""
    cautious_weight_decay: bool = True
    """Decay only where the update and the weight have the same sign."""
    qk_clip: float = 0.0
    """Largest attention logit before a head's query and key weights are scaled down (QK-clip, arXiv:2507.20534; Kimi K2
    has 100); 0 = off. For attention without norms of queries and keys."""


@dataclass(kw_only=True)
class Optimizer:
    lr: float = 8e-4
    """Peak learning rate of groups that name none."""
    beta1: float = 0.9
    """AdamW first-moment decay of groups that name none."""
    beta2: float = 0.95
    """AdamW second-moment decay of groups that name none."""
    eps: float = 1e-8
    """AdamW denominator offset."""
    weight_decay: float = 0.1
    """Weight decay of groups that name none."""
    implementation: Literal["fused", "foreach", "for-loop"] = "fused"
    """AdamW kernel."""
    scaling: Literal["none", "nanochat"] = "none"
    """`nanochat`: batch, learning rates, weight decay and horizon follow the model's size (optim/scaling.py)."""
    groups: list[OptimizerGroup] = field(default_factory=list)
    """Parameter groups, first match wins, every parameter in exactly one; empty = the model family's own."""
    muon: Muon = field(default_factory=Muon)


@dataclass(kw_only=True)
class LrSchedule:
    kind: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    """Shape after warm-up; `wsd` stays at the peak, then falls linearly over the last `decay_ratio`."""
    warmup_steps: int = 40
    """Steps of linear warm-up."""
    decay_ratio: float = 0.65
    """Fraction of the run that `wsd` spends falling."""
    min_lr_factor: float = 0.05
    """Learning rate at the end, as a fraction of the peak."""


@dataclass(kw_only=True)
class Parallelism:
    data_parallel_replicate_degree: int = 1
    """Copies of the sharded model (HSDP); 1 = none."""
    data_parallel_shard_degree: int = -1
    """Ranks that share one copy (FSDP2); -1 = all that are left."""
    fsdp_reshard_after_forward: Literal["default", "always", "never"] = "default"
    """Free gathered weights between forward and backward; `default`: when they are sharded over more than one rank,
    and no pipeline runs many micro-batches through them."""
    fsdp_reduce_last_only: bool | None = None
    """Sum gradients over ranks after the last micro-batch only: less traffic, but whole gradients stay in memory;
    none = where there is a pipeline, which always does."""
    enable_cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory between uses; wants a GPU."""
    tensor_parallel_degree: int = 1
    """Ranks that share every layer's heads and channels, and the sequence between layers."""
    enable_async_tensor_parallel: bool = False
    """Overlap tensor-parallel transfers with matrix products, by compiling them together; wants a GPU and compile."""
    pipeline_parallel_degree: int = 1
    """Ranks that hold successive layers."""
    pipeline_parallel_schedule: Literal[
        "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
    ] = "1F1B"
    """Order of the micro-batches' forwards and backwards. A micro-batch has `training.local_batch_size` rows; the
    schedules after 1F1B keep two stages or more on a rank."""
    pipeline_parallel_stages_per_rank: int = 0
    """Stages a rank holds; 0 = one, or two where the schedule interleaves."""
    pipeline_parallel_layers: list[int] = field(default_factory=list)
    """Layers of each stage, first to last; empty = split by estimated FLOPs, embedding and head included."""
    context_parallel_degree: int = 1
    """Ranks that share every row's tokens."""
    context_parallel_method: Literal["allgather", "ring", "ulysses"] = "allgather"
    """How attention sees the other ranks' tokens: gather all keys and values; pass them around in a ring; or exchange
    tokens for heads (arXiv:2309.14509)."""
    context_parallel_load_balancer: Literal["headtail", "none"] = "headtail"
    """Tokens of a rank: one chunk from the row's head and one from its tail, which evens out causal attention; or one
    chunk. `ulysses` is even without."""
    expert_parallel_degree: int = 1
    """Ranks that share a layer's experts; taken from the data and tensor ranks, not a factor of the world."""
    expert_tensor_parallel_degree: int = 1
    """Ranks that share one expert's channels: 1, or `tensor_parallel_degree`."""


@dataclass(kw_only=True)
class ActivationCheckpoint:
    mode: Literal["none", "selective", "op", "full"] = "none"
    """Recompute activations in backward: of no block, of every `every_n_layers`th, of all; or of all but the costly
    operations' (`op`: attention, every second matrix product and collectives are kept)."""
    every_n_layers: int = 2
    """Blocks from one recomputed block to the next, for `selective`."""


@dataclass(kw_only=True)
class Compile:
    enable: Literal["auto", "on", "off"] = "auto"
    """torch.compile of every block. `auto`: on a GPU, or where a CPU run is long enough to earn it back."""
    backend: str = "inductor"
    """torch.compile backend."""


@dataclass(kw_only=True)
class Checkpoint:
    enable: bool = True
    """Write checkpoints at all."""
    interval: int = 500
    """Steps between checkpoints; 0 = only at the end."""
    keep_latest_k: int = 3
    """Checkpoints kept; 0 = all."""
    async_mode: Literal["auto", "disabled", "async"] = "auto"
    """Write while training goes on; `auto` = on a GPU."""
    initial_load_path: str = ""
    """Run, checkpoint, Hugging Face or nanochat's folder whose weights start a fresh run."""
    initial_load_grow: bool = False
    """Let parts of the model that those weights lack begin as in a fresh run: an indexer, layers that predict ahead."""


@dataclass(kw_only=True)
class Validation:
    freq: int = 250
    """Steps between evaluations of bits per byte; 0 = never during training."""
    max_bytes: int = 1_000_000
    """An evaluation during training reads whole held-out documents until it has this many bytes."""
    final_max_bytes: int = 10_000_000
    """The same of the evaluation at the end; 0 = all documents."""
    local_batch_size: int = 0
    """Rows at once; 0 = `training.local_batch_size`, or 8 where that is 0 too."""
    sources: list[Source] = field(default_factory=list)
    """Held-out text; empty = the held-out files of `data.sources`."""


@dataclass(kw_only=True)
class Sampling:
    freq: int = 0
    """Steps between samples; 0 = only at the end."""
    prompts: list[str] = field(default_factory=list)
    """Texts to continue; empty = no samples."""
    max_tokens: int = 48
    """New tokens a prompt."""
    temperature: float = 0.0
    """0 = greedy."""
    top_k: int = 0
    """Candidates kept; 0 = all."""


@dataclass(kw_only=True)
class Metrics:
    log_freq: int = 10
    """Steps between log lines."""
    tensorboard: bool = False
    """Write TensorBoard events to `tb/` of the run folder."""


@dataclass(kw_only=True)
class Profiling:
    enable_profiling: bool = False
    """Write torch.profiler traces to `traces/` of the run folder."""
    profile_freq: int = 10
    """Steps between traces."""
    profiler_warmup: int = 3
    """Steps the profiler runs before it records."""
    profiler_active: int = 1
    """Steps a trace holds."""


@dataclass(kw_only=True)
class Comm:
    init_timeout_seconds: int = 300
    """Seconds a collective may wait for the slowest rank until this process has done its first step, which loads,
    compiles and connects."""
    train_timeout_seconds: int = 100
    """Seconds a collective may wait after that step. One rank that hangs ends the run this much later."""
    outside_timeout_seconds: int = 1800
    """Seconds a collective may wait outside of steps: while one trains the tokenizer, saves, evaluates or samples."""
    trace_buf_size: int = 20_000
    """Latest collectives each rank remembers, written to `traces/` of the run folder when one hangs; 0 = none."""
    check_at_start: bool = True
    """Let the ranks of a job compare code, config and clocks and try an all-reduce before anything else."""
    max_clock_skew_seconds: float = 5.0
    """Seconds that a rank's clock may differ from the others' at start."""


@dataclass(kw_only=True)
class Debug:
    seed: int = 42
    """Source of all randomness: initial weights, data order, samples."""
    deterministic: bool = False
    """Only deterministic kernels: same machine, same mesh, same bits."""


@dataclass(kw_only=True)
class Job:
    """One training job: everything a run folder needs to be made again."""

    job: JobInfo = field(default_factory=JobInfo)
    model: Model = field(default_factory=Model)
    tokenizer: Tokenizer = field(default_factory=Tokenizer)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_schedule: LrSchedule = field(default_factory=LrSchedule)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    sampling: Sampling = field(default_factory=Sampling)
    metrics: Metrics = field(default_factory=Metrics)
    profiling: Profiling = field(default_factory=Profiling)
    comm: Comm = field(default_factory=Comm)
    debug: Debug = field(default_factory=Debug)
