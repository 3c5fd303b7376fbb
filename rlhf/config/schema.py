"""The typed configuration: the only store of defaults and of field documentation.

YAML files under `conf/` hold differences from these defaults, nothing else. A stage's own options live beside it in
`rlhf/stages/<name>/config.py` and derive from `StageConfig`. Nothing here imports torch.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.config.choices import Accelerator as Accelerator
from rlhf.config.choices import Exhausted as Exhausted
from rlhf.config.choices import LauncherKind as LauncherKind
from rlhf.config.choices import LossOn as LossOn
from rlhf.config.choices import Mode as Mode
from rlhf.config.choices import Normalize as Normalize
from rlhf.config.choices import OnProblem as OnProblem
from rlhf.config.choices import Precision as Precision
from rlhf.config.choices import Reuse as Reuse
from rlhf.config.choices import Schedule as Schedule
from rlhf.config.choices import Unread as Unread
from rlhf.config.choices import WeightSource as WeightSource
from rlhf.config.data import AUTO as AUTO
from rlhf.config.data import DataConfig as DataConfig
from rlhf.config.data import SourceConfig as SourceConfig
from rlhf.config.data import SplitConfig as SplitConfig
from rlhf.config.fields import option, option_factory
from rlhf.config.policy import REWARD_MODEL as REWARD_MODEL
from rlhf.config.policy import RolloutConfig as RolloutConfig
from rlhf.config.policy import ScorerConfig as ScorerConfig

if TYPE_CHECKING:
    from rlhf.config.roles import Role


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = option(1e-5, "Peak learning rate.", above=0)
    betas: list[float] = option_factory(lambda: [0.9, 0.95], "AdamW's two decay rates.")
    eps: float = option(1e-8, "AdamW's epsilon.", minimum=0)
    weight_decay: float = option(0.0, "Decoupled weight decay; biases and norms are exempt.", minimum=0)
    schedule: Schedule = option(Schedule.cosine, "Shape of the decay after the warm-up: constant, linear or cosine.")
    warmup_ratio: float = option(
        0.03, "Share of the optimizer steps over which the rate rises linearly.", minimum=0, maximum=1
    )
    final_ratio: float = option(
        0.1, "Rate at the last step as a share of the peak (linear and cosine).", minimum=0, maximum=1
    )
    max_grad_norm: float = option(
        1.0, "Global gradient norm at which gradients are clipped; 0 turns clipping off.", minimum=0
    )


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What every stage has. A stage adds its own options by deriving from this class."""

    name: str = option("", "The stage: a folder of rlhf/stages.")
    objective: str = option("", "The metric of the last evaluation that a sweep compares runs by.")

    def roles(self) -> "list[Role]":
        """The models that the stage keeps at the same time."""
        return []

    def problems(self, prefix: str, ranks: int) -> list[str]:
        """What is wrong with these options on so many ranks; `prefix` is where they stand: "stage", "stage.ppo"."""
        return []

    def inputs(self) -> tuple[str, ...]:
        """The groups of the configuration, beside stage and data, that decide what the stage trains."""
        return ("model", "reward_model", "memory", "lora", "rollout", "scorer")

    def schedule(self) -> list[str]:
        """What is known of the stage's length before its data are read, in sentences."""
        return []


@dataclass(kw_only=True, slots=True)
class ScratchConfig:
    """Size of a model that is created with random weights and a tokenizer trained on the run's data."""

    architecture: str = option("opt", "Hugging Face model type.")
    vocab_size: int = option(4096, "Entries of the byte-level BPE vocabulary, special tokens included.", minimum=1)
    num_layers: int = option(4, "Transformer blocks.", minimum=1)
    hidden_size: int = option(256, "Width of the residual stream.", minimum=1)
    num_heads: int = option(4, "Attention heads.", minimum=1)
    intermediate_size: int = option(1024, "Width of the feed-forward layer.", minimum=1)
    max_positions: int = option(256, "Longest sequence in tokens.", minimum=1)


@dataclass(kw_only=True, slots=True)
class ArchitectureConfig:
    """What planning has to know of a pretrained model; a local directory's config.json tells it by itself."""

    family: str | None = option(
        None, "Hugging Face model type: opt, llama, qwen2, qwen3, gpt_neox, bloom; null: unknown."
    )
    num_layers: int = option(0, "Transformer blocks.", minimum=0)
    hidden_size: int = option(0, "Width of the residual stream.", minimum=0)
    num_heads: int = option(0, "Attention heads.", minimum=0)
    num_kv_heads: int | None = option(None, "Heads of keys and values; null: as many as attention heads.", minimum=1)
    head_dim: int | None = option(None, "Width of a head; null: hidden_size / num_heads.", minimum=1)
    intermediate_size: int = option(0, "Width of the feed-forward layer.", minimum=0)
    vocab_size: int = option(0, "Rows of the embedding.", minimum=0)
    max_positions: int = option(0, "Longest sequence in tokens.", minimum=0)
    tied_embeddings: bool = option(True, "Whether the output layer is the embedding.")
    embedding_size: int | None = option(
        None, "Width of the embedding where it differs from hidden_size (OPT-350M).", minimum=1
    )
    final_norm: bool = option(True, "Whether there is a norm after the last block (OPT-350M has none).")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """One pretrained, packaged or new model."""

    name: str = option("", "Short name, used for run directories.")
    source: WeightSource = option(WeightSource.pretrained, "Where the weights come from.")
    path: str | None = option(None, "Local directory or ORG/NAME on the Hugging Face hub (source=pretrained).")
    revision: str | None = option(None, "Branch, tag or commit on the hub.")
    package: str | None = option(None, "Python package that carries the weights (source=gguf_package).")
    gguf_file: str | None = option(None, "Name of the GGUF file inside the package.")
    extra: str | None = option(None, "The extra of this project that installs the package.")
    chat_template: str | None = option(
        None,
        "Jinja chat template, or the path of a file with one; it wins over the tokenizer's own. null: the tokenizer's, "
        "or else named turns, one below the other.",
    )
    attention: str = option("sdpa", "Attention implementation of transformers: eager, sdpa, flash_attention_2, …")
    scratch: ScratchConfig = option_factory(ScratchConfig, "The model to create (source=scratch).")
    architecture: ArchitectureConfig = option_factory(ArchitectureConfig, "Its sizes, for planning.")
    lora_targets: list[str] = option_factory(list, "Names of the linear layers that LoRA adapts.")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """The machines of a run."""

    name: str = option("", "Short name.")
    accelerator: Accelerator = option(
        Accelerator.auto, "Device of the ranks; auto takes CUDA if there is any, else the CPU."
    )
    nodes: int = option(1, "Machines.", minimum=1, maximum=10_000)
    gpus_per_node: int | None = option(
        None, "Ranks per machine; null takes all GPUs, or two ranks on a CPU.", minimum=1, maximum=1024
    )
    threads_per_rank: int | None = option(
        None, "CPU threads per rank; null divides the cores among the ranks.", minimum=1
    )
    gpu: str | None = option(None, "The GPU's name as nvidia-smi has it, or a part of it; null: any.")
    gpu_memory_gib: float | None = option(None, "Memory of one GPU in GiB; null: what this machine has.", above=0)
    bf16: bool | None = option(None, "Whether the GPU computes in bf16; null: what this machine's does.")
    peak_tflops: float | None = option(None, "Peak dense 16-bit TFLOP/s of one GPU.")
    memory_bandwidth_gbs: float | None = option(None, "Memory bandwidth of one GPU in GB/s.")
    link_gbs: float | None = option(None, "Bandwidth between the GPUs of a machine, per GPU and direction, in GB/s.")
    network_gbs: float | None = option(None, "Bandwidth between machines, per machine and direction, in GB/s.")
    pcie_gbs: float | None = option(None, "Bandwidth between a GPU and the host's memory, per direction, in GB/s.")
    host_memory_gib: float | None = option(None, "Memory of one machine in GiB; null: what this machine has.", above=0)
    price_per_gpu_hour: float | None = option(None, "US dollars per GPU and hour, on demand.", minimum=0)


@dataclass(kw_only=True, slots=True)
class RoleMemoryConfig:
    """The placement of one role's states where it differs from the other roles'."""

    zero_stage: int | None = option(
        None, "ZeRO stage of this role: 0 to 3 (0 or 3 if it is frozen); null: as `memory`.", minimum=0, maximum=3
    )
    offload_optimizer: bool | None = option(None, "Keep its optimizer states in the host's memory; null: as `memory`.")
    offload_parameters: bool | None = option(
        None, "Keep its parameters in the host's memory (ZeRO-3); null: as `memory`."
    )
    gradient_checkpointing: bool | None = option(None, "Recompute its activations; null: as `memory`.")


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """How model states are placed."""

    zero_stage: int | None = option(
        None,
        "ZeRO stage of the trained models: 0 to 3; null: the first of 1, 2, 3 that the hardware can hold, "
        "on one rank 0 (in fp16 1).",
        minimum=0,
        maximum=3,
    )
    offload_optimizer: bool = option(False, "Keep optimizer states in the host's memory (ZeRO-1 to 3).")
    offload_parameters: bool = option(False, "Keep parameters in the host's memory (ZeRO-3).")
    precision: Precision = option(
        Precision.auto,
        "Format of the computing weights; auto: bf16 if the device has it, else fp16 (GPU) or fp32 (CPU).",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    actor: RoleMemoryConfig = option_factory(RoleMemoryConfig, "PPO's policy, where it differs.")
    critic: RoleMemoryConfig = option_factory(RoleMemoryConfig, "PPO's critic, where it differs.")
    reference: RoleMemoryConfig = option_factory(RoleMemoryConfig, "PPO's reference model, where it differs.")
    reward_model: RoleMemoryConfig = option_factory(RoleMemoryConfig, "PPO's reward model, where it differs.")

    def of_role(self, name: str, *, trained: bool) -> "RoleMemory":
        """The placement of a role's states. A frozen role is partitioned only if the trained ones' parameters are."""
        assert self.zero_stage is not None, "the ZeRO stage is resolved before it is used"
        own: RoleMemoryConfig = getattr(self, name, None) or RoleMemoryConfig()
        inherited = self.zero_stage if trained or self.zero_stage == 3 else 0
        stage = inherited if own.zero_stage is None else own.zero_stage

        def chosen(key: str) -> bool:
            value = getattr(own, key)
            return bool(getattr(self, key) if value is None else value)

        return RoleMemory(
            zero_stage=stage,
            offload_optimizer=trained and stage > 0 and chosen("offload_optimizer"),
            offload_parameters=stage == 3 and chosen("offload_parameters"),
            gradient_checkpointing=trained and chosen("gradient_checkpointing"),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleMemory:
    """The resolved placement of one role's states."""

    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    gradient_checkpointing: bool


@dataclass(kw_only=True, slots=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021): W + alpha/rank B A is trained instead of W."""

    rank: int | None = option(None, "Rank of the adapters; null trains all weights.", minimum=1)
    critic_rank: int | None = option(
        None, "Rank of the critic's adapters; null: as `rank`; 0 trains all its weights.", minimum=0
    )
    rm_rank: int | None = option(
        None, "Rank of the reward model's own adapters; null: as `rank`; 0 trains all its weights.", minimum=0
    )
    alpha: float | None = option(None, "Scale of the adapters is alpha / their rank; null: 2 × their rank.", above=0)
    learning_rate: float | None = option(
        None,
        "Peak learning rate of the adapters; null: their optimizer's, which a scalar head and, with only_lora=false, "
        "norms and embeddings have in any case.",
        above=0,
    )
    dropout: float = option(0.0, "Dropout before the adapters; PPO needs 0.", minimum=0, maximum=0.99)
    targets: list[str] | None = option(
        None, "Names of the linear layers to adapt; null takes the model's lora_targets."
    )
    only_lora: bool = option(
        True,
        "Train the adapters alone (and a scalar head). false: norms, embeddings and the output layer, too (norms and "
        "embeddings: Chen et al. 2024, LongLoRA); the reference of a policy is then a copy of its own.",
    )
    roles: list[str] = option_factory(
        lambda: ["sft", "rm", "actor", "critic"],
        "What is adapted: sft and rm (the model of that stage), actor, critic.",
    )

    def rank_of(self, *, stage: str, role: str) -> int | None:
        """The rank of the adapters through which a stage's role is trained; None if all its weights are."""
        name = stage if role == "model" else role
        own = {"critic": self.critic_rank, "rm": self.rm_rank}.get(name)
        rank = self.rank if own is None else own
        return rank if rank and name in self.roles else None

    def adapts(self, *, stage: str, role: str) -> bool:
        """Whether a stage's role is trained through adapters."""
        return self.rank_of(stage=stage, role=role) is not None


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """What is recorded beside the run directory's own files."""

    wandb: bool = option(False, "Send metrics and samples to Weights & Biases.")
    project: str = option("rlhf", "Weights & Biases project.")
    offline: bool = option(False, "Keep Weights & Biases files on disk; `wandb sync` sends them later.")


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """How ranks are started."""

    kind: LauncherKind = option(
        LauncherKind.local, "What reaches the machines: local, pdsh, openmpi, mpich, slurm, no_ssh."
    )
    hostfile: str | None = option(None, "File with a line `NAME slots=N` for every machine.")
    include: str | None = option(None, "Machines and GPUs of the hostfile to use, as in `node1@node2:0,2`.")
    exclude: str | None = option(None, "Machines and GPUs of the hostfile to leave out, in the same form.")
    node_rank: int | None = option(
        None, "kind=no_ssh: the number of this machine, from 0; launch.py runs on each of them."
    )
    master_addr: str | None = option(None, "Name or address of the first machine, as the others reach it.")
    master_port: int | None = option(
        None, "Port of the rendezvous; null picks a free one.", minimum=1024, maximum=65535
    )
    ssh_port: int | None = option(
        None, "kind=pdsh: port of the machines' ssh servers; null for the usual one.", minimum=1, maximum=65535
    )
    options: str | None = option(None, "Further options for pdsh, mpirun or srun, as one text.")
    environment: dict[str, str] = option_factory(
        dict, "Variables that every rank gets, as in  +launcher.environment.NCCL_DEBUG=INFO; never secrets."
    )
    timeout_minutes: float = option(
        30.0, "How long a collective operation may wait for the other ranks.", above=0, maximum=1e6
    )


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    stage: StageConfig = option_factory(StageConfig, "What to train.")
    model: ModelConfig = option_factory(ModelConfig, "The policy.")
    reward_model: ModelConfig = option_factory(ModelConfig, "The model that the reward model and critic start from.")
    data: DataConfig = option_factory(DataConfig, "The data mix.")
    hardware: HardwareConfig = option_factory(HardwareConfig, "The machines.")
    memory: MemoryConfig = option_factory(MemoryConfig, "The placement of model states.")
    lora: LoraConfig = option_factory(LoraConfig, "Low-rank adapters.")
    rollout: RolloutConfig = option_factory(RolloutConfig, "Sampling.")
    scorer: ScorerConfig = option_factory(ScorerConfig, "Scoring.")
    tracking: TrackingConfig = option_factory(TrackingConfig, "Tracking.")
    launcher: LauncherConfig = option_factory(LauncherConfig, "Launching.")
    mode: Mode = option(
        Mode.run, "run: train. plan: print the resolved commands and DeepSpeed configurations, and stop."
    )
    key: str | None = option(None, "mode=explain: the option to explain, as in  key=stage.kl_coef.")
    reuse: Reuse = option(
        Reuse.auto,
        "auto: take over a stage that was trained before with the same inputs. off: take over none of another run. "
        "finished: as auto, and keep what this run has finished even if its data, weights or code have changed since.",
    )
    seed: int = option(1, "Seed of initialisation, shuffling and sampling.", minimum=0)
    run_dir: str | None = option(None, "Where the run is written; null: runs/<stage>-<model>-<data>-seed<seed>-<hash>.")
    cache_dir: str | None = option(None, "Where prepared models and data are kept; null: $RLHF_CACHE or ~/.cache/rlhf.")
