"""The typed configuration: the only store of defaults and of field documentation.

YAML files under `conf/` hold differences from these defaults, nothing else. A stage's own options live beside it in
`rlhf/stages/<name>/config.py` and derive from `StageConfig`. Nothing here imports torch.
"""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from rlhf.config.fields import option, option_factory

if TYPE_CHECKING:
    from rlhf.config.roles import Role


class Precision(Enum):
    """The number format of the weights that compute; the optimizer's master weights are always fp32."""

    auto = "auto"
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


class Schedule(Enum):
    """How the learning rate moves after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class WeightSource(Enum):
    """Where a model's weights come from."""

    pretrained = "pretrained"
    scratch = "scratch"
    gguf_package = "gguf_package"


class Accelerator(Enum):
    """The kind of device that ranks run on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DataFormat(Enum):
    """The columns of a data source's rows."""

    preference = "preference"
    prompt = "prompt"


class OnProblem(Enum):
    """What to do with a row that cannot be used."""

    error = "error"
    skip = "skip"


class Mode(Enum):
    """What `launch.py` does with the configuration."""

    run = "run"
    plan = "plan"


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    learning_rate: float = option(1e-5, "Peak learning rate.")
    betas: list[float] = option_factory(lambda: [0.9, 0.95], "AdamW's two decay rates.")
    eps: float = option(1e-8, "AdamW's epsilon.")
    weight_decay: float = option(0.0, "Decoupled weight decay; biases and norms are exempt.")
    schedule: Schedule = option(Schedule.cosine, "Shape of the decay after the warm-up: constant, linear or cosine.")
    warmup_ratio: float = option(0.03, "Share of the optimizer steps over which the rate rises linearly.")
    final_ratio: float = option(0.1, "Rate at the last step as a share of the peak (linear and cosine).")
    max_grad_norm: float = option(1.0, "Global gradient norm at which gradients are clipped; 0 turns clipping off.")


@dataclass(kw_only=True, slots=True)
class StageConfig:
    """What every stage has. A stage adds its own options by deriving from this class."""

    name: str = option("", "The stage: a folder of rlhf/stages.")

    def roles(self) -> "list[Role]":
        """The models that the stage keeps at the same time."""
        return []

    def problems(self, prefix: str, ranks: int) -> list[str]:
        """What is wrong with these options on so many ranks; `prefix` is where they stand: "stage", "stage.ppo"."""
        return []


@dataclass(kw_only=True, slots=True)
class ScratchConfig:
    """Size of a model that is created with random weights and a tokenizer trained on the run's data."""

    architecture: str = option("opt", "Hugging Face model type.")
    vocab_size: int = option(4096, "Entries of the byte-level BPE vocabulary, special tokens included.")
    num_layers: int = option(4, "Transformer blocks.")
    hidden_size: int = option(256, "Width of the residual stream.")
    num_heads: int = option(4, "Attention heads.")
    intermediate_size: int = option(1024, "Width of the feed-forward layer.")
    max_positions: int = option(256, "Longest sequence in tokens.")


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
    chat_template: str | None = option(None, "Jinja chat template for models that have none.")
    attention: str = option("sdpa", "Attention implementation of transformers: eager, sdpa, flash_attention_2, …")
    scratch: ScratchConfig = option_factory(ScratchConfig, "The model to create (source=scratch).")


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One source of rows in a data mix."""

    kind: str = option("file", "A module of rlhf/data/sources: file, film_reviews, …")
    format: DataFormat = option(DataFormat.preference, "The columns of the rows.")
    path: str | None = option(None, "File or directory to read (kind=file).")
    part: str | None = option(None, "Which part of a packaged source to read.")
    opening_words: int = option(2, "kind=film_reviews: words of the review that the prompt gives away.")
    weight: float | None = option(
        None, "Share in the training mix relative to the other sources; null for all: every row is used."
    )


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    """How prompts are divided; every prompt belongs to exactly one part."""

    sft: float = option(0.2, "Relative share of the prompts for supervised fine-tuning.")
    rm: float = option(0.4, "Relative share of the prompts for the reward model.")
    ppo: float = option(0.4, "Relative share of the prompts for PPO.")
    held_out: float = option(0.05, "Share of each stage's prompts that is kept for evaluation.")
    seed: int = option(0, "Seed of the hash that assigns prompts; the same for all stages of a pipeline.")


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A mix of data sources and its division over the stages."""

    name: str = option("", "Short name, used for run directories.")
    sources: dict[str, SourceConfig] = option_factory(dict, "The sources by name.")
    split: SplitConfig = option_factory(SplitConfig, "The division over the stages.")
    max_prompt_length: int = option(256, "Longest prompt in tokens, chat template included.")
    max_response_length: int = option(
        256, "Longest response in tokens, EOS included; longer ones are truncated and counted."
    )
    on_bad_row: OnProblem = option(OnProblem.error, "Stop at rows that cannot be used, or skip and count them.")
    on_long_prompt: OnProblem = option(
        OnProblem.error, "Stop at prompts beyond max_prompt_length, or skip and count them."
    )
    sft_on_rejected: bool = option(False, "Fine-tune on the rejected answers as well as on the chosen ones.")
    judge: str | None = option(
        None, "A module of rlhf/data/sources with reviews for an independent judge; null for none."
    )


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    """The machines of a run."""

    name: str = option("", "Short name.")
    accelerator: Accelerator = option(
        Accelerator.auto, "Device of the ranks; auto takes CUDA if there is any, else the CPU."
    )
    nodes: int = option(1, "Machines.")
    gpus_per_node: int | None = option(None, "Ranks per machine; null takes all GPUs, or two ranks on a CPU.")
    threads_per_rank: int | None = option(None, "CPU threads per rank; null divides the cores among the ranks.")


@dataclass(kw_only=True, slots=True)
class MemoryConfig:
    """How model states are placed."""

    zero_stage: int = option(1, "ZeRO stage of the trained models: 0 to 3.")
    precision: Precision = option(
        Precision.auto,
        "Format of the computing weights; auto: bf16 if the device has it, else fp16 (GPU) or fp32 (CPU).",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Sampling of responses."""

    temperature: float = option(1.0, "Sampling temperature; log-probabilities use the same.")
    top_p: float = option(1.0, "Nucleus sampling; values below 1 bias the PPO ratio and are warned about.")
    top_k: int = option(0, "Sample from the k likeliest tokens; 0 for all. Other values bias the PPO ratio.")
    max_new_tokens: int | None = option(None, "Longest response in tokens; null takes data.max_response_length.")
    batch_size_per_gpu: int | None = option(None, "Prompts generated together on a rank; null for all at once.")


@dataclass(kw_only=True, slots=True)
class ScorerConfig:
    """From a response to its score."""

    normalize: bool = option(True, "Subtract the reward model's stored mean and divide by its standard deviation.")
    clip: float | None = option(5.0, "Clip scores to [-clip, clip] after normalisation; null for no clipping.")
    missing_eos_penalty: float = option(2.0, "Taken off the score of a response that does not end with EOS.")


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """What is recorded beside the run directory's own files."""

    wandb: bool = option(False, "Send metrics and samples to Weights & Biases.")
    project: str = option("rlhf", "Weights & Biases project.")
    offline: bool = option(False, "Keep Weights & Biases files on disk; `wandb sync` sends them later.")


@dataclass(kw_only=True, slots=True)
class LauncherConfig:
    """How ranks are started."""

    master_port: int | None = option(None, "Port of the rendezvous; null picks a free one.")
    timeout_minutes: float = option(30.0, "How long a collective operation may wait for the other ranks.")


@dataclass(kw_only=True, slots=True)
class Config:
    """A whole run."""

    stage: StageConfig = option_factory(StageConfig, "What to train.")
    model: ModelConfig = option_factory(ModelConfig, "The policy.")
    reward_model: ModelConfig = option_factory(ModelConfig, "The model that the reward model and critic start from.")
    data: DataConfig = option_factory(DataConfig, "The data mix.")
    hardware: HardwareConfig = option_factory(HardwareConfig, "The machines.")
    memory: MemoryConfig = option_factory(MemoryConfig, "The placement of model states.")
    rollout: RolloutConfig = option_factory(RolloutConfig, "Sampling.")
    scorer: ScorerConfig = option_factory(ScorerConfig, "Scoring.")
    tracking: TrackingConfig = option_factory(TrackingConfig, "Tracking.")
    launcher: LauncherConfig = option_factory(LauncherConfig, "Launching.")
    mode: Mode = option(
        Mode.run, "run: train. plan: print the resolved commands and DeepSpeed configurations, and stop."
    )
    seed: int = option(1, "Seed of initialisation, shuffling and sampling.")
    run_dir: str | None = option(None, "Where the run is written; null: runs/<stage>-<model>-<data>-seed<seed>-<hash>.")
    cache_dir: str | None = option(None, "Where prepared models and data are kept; null: $RLHF_CACHE or ~/.cache/rlhf.")
