"""The options of the configuration that are one of a few words."""

from enum import Enum


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


class RolloutBackend(Enum):
    """What generates responses."""

    auto = "auto"
    native = "native"
    vllm = "vllm"
    hf = "hf"


class Mismatch(Enum):
    """What to do if generation and training disagree on log-probabilities."""

    warn = "warn"
    hf = "hf"
    stop = "stop"


class OnProblem(Enum):
    """What to do with a row that cannot be used."""

    error = "error"
    skip = "skip"


class LossOn(Enum):
    """The answers of a conversation that fine-tuning learns."""

    auto = "auto"
    last = "last"
    all = "all"


class Unread(Enum):
    """What to do about columns and keys that nothing reads."""

    list = "list"
    error = "error"


class Exhausted(Enum):
    """What a weighted source does whose rows are used up before the others' are."""

    stop = "stop"
    repeat = "repeat"


class Mode(Enum):
    """What `launch.py` does with the configuration."""

    run = "run"
    plan = "plan"
    data = "data"
    explain = "explain"


class Reuse(Enum):
    """Whether a stage that was trained before with the same inputs is taken over."""

    auto = "auto"
    off = "off"
    finished = "finished"


class Normalize(Enum):
    """By what scores are normalised."""

    model = "model"
    running = "running"
    off = "off"


class PtxMode(Enum):
    """How the pretraining mix is weighted."""

    coef = "coef"
    grad_ratio = "grad_ratio"


class KlPlacement(Enum):
    """Where the divergence from the reference is punished."""

    reward = "reward"
    loss = "loss"


class DpoLoss(Enum):
    """How a pair's difference of log-ratios becomes a loss."""

    sigmoid = "sigmoid"
    ipo = "ipo"


class RuleAction(Enum):
    """What a health rule does when it finds something."""

    warn = "warn"
    stop = "stop"
    off = "off"


class LauncherKind(Enum):
    """How the ranks of several machines are started."""

    local = "local"
    pdsh = "pdsh"
    openmpi = "openmpi"
    mpich = "mpich"
    slurm = "slurm"
    no_ssh = "no_ssh"
