"""What the flags of DeepSpeed-Chat's scripts are called here: one table for error messages and for the documentation.

Scripts of https://github.com/deepspeedai/DeepSpeedExamples, applications/DeepSpeed-Chat.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Equivalent:
    """What a flag is here.

    `here` are arguments of launch.py, in which `{value}` is the flag's value, `{0}`, `{1}`, … are its parts between
    commas, and `{stage}` is where the options of the script's stage stand: "stage", or "stage.sft" in a pipeline.
    Empty: there is no option, and `note` says why. `example` is a value to show it with. `values` are the arguments for
    single values where they are others. A note, too, may name `{stage}`. `prefix` may stand before such a value.
    """

    here: str = ""
    note: str = ""
    example: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def arguments(self, stage: str, value: str | None = None) -> str:
        """The arguments for a value (None: the example's), with options at `stage`; "" where there is no option."""
        given = self.example if value is None else value
        wanted = self.values.get(given.removeprefix(self.prefix), self.here)
        try:
            return wanted.format(*given.split(","), stage=stage, value=given)
        except IndexError:  # Too few parts.
            return self.here.format(*self.example.split(","), stage=stage, value=self.example)

    def remark(self, stage: str) -> str:
        """The note, with options at `stage`."""
        return self.note.replace("{stage}", stage)


def _option(here: str, example: str = "", note: str = "", **values: str) -> Equivalent:
    return Equivalent(here=here, example=example, note=note, values=values)


def _none(note: str) -> Equivalent:
    return Equivalent(note=note)


def _opt(known: str, here: str, example: str) -> Equivalent:
    sizes = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")
    values = {size: known.format(size) for size in sizes}
    return Equivalent(here=here, example=example, values=values, prefix="facebook/opt-")


_SCHEDULES = {
    "constant_with_warmup": "{stage}.optimizer.schedule=constant",
    **dict.fromkeys(("cosine_with_restarts", "polynomial"), "{stage}.optimizer.schedule=cosine"),
}
_NEAREST = "constant, linear or cosine; restarts and polynomial decay are not there, cosine is the nearest"
_WARMUP = "a share of the optimizer steps, not their number"
_BATCH = "all sequences of an optimizer step: those per device × GPUs × accumulation"
_TARGETS = "names of layers, not a part of their path; without it the model's usual ones"
_SOURCE = "data=deepspeed_chat is the mix of the published runs; data.sources.main.kind=file reads a file"
_LORA = "alpha=1 keeps DeepSpeed-Chat's scale, 1 / lora_dim; the default is 2 × rank"
_NO_DROPOUT = "there is no dropout: passes of the same policy must agree"
_RATE = _option(
    "lora.learning_rate={value}",
    "5e-4",
    "of all adapters; without it they have the rate of their optimizer, which with lora.only_lora=true is theirs alone",
)

# Flags of all training scripts.
_EVERYWHERE: dict[str, Equivalent] = {
    "--data_path": _option(
        "data=files data.sources.main.kind=hub data.sources.main.path={value}", "Dahoas/rm-static", _SOURCE
    ),
    "--data_split": _option("data.split.sft={0} data.split.rm={1} data.split.ppo={2}", "2,4,4"),
    "--data_output_path": _option("cache_dir={value}", "/tmp/data_files"),
    "--output_dir": _option("run_dir={value}", "output"),
    "--seed": _option("seed={value}", "1234"),
    "--local_rank": _none("the launcher tells each process its rank"),
    "--dtype": _option("memory.precision={value}", "bf16"),
    "--offload": _option(
        "memory.offload_optimizer=true", note="memory=zero3-offload keeps the parameters in the host's memory, too"
    ),
    "--only_optimize_lora": _option(
        "lora.only_lora=true", note="the default; false trains norms, embeddings and the output layer, too"
    ),
    "--compute_fp32_loss": _none("losses are always computed in fp32"),
    "--enable_tensorboard": _none("a run writes metrics.jsonl, plots and a report; tracking=wandb sends them"),
    "--tensorboard_path": _none("a run writes metrics.jsonl, plots and a report; tracking=wandb sends them"),
    "--add_eot_token": _none("answers end with the EOS of the tokenizer or of its chat template"),
    "--deepspeed": _none("every stage runs under DeepSpeed"),
    "--deepspeed_config": _none("DeepSpeed's configuration follows from the options; mode=plan shows it"),
}


def _training(stage: str, model: str) -> dict[str, Equivalent]:
    """The flags of a stage that trains one model; `model` chooses it."""
    return _EVERYWHERE | {
        "--model_name_or_path": _option(
            model, "facebook/opt-1.3b", "model=opt1.3b and others have their sizes in conf/"
        ),
        "--per_device_train_batch_size": _option(
            "{stage}.micro_batch_size_per_gpu={value}", "4", "{stage}.batch_size is the batch of all GPUs"
        ),
        "--per_device_eval_batch_size": _none("evaluation uses {stage}.micro_batch_size_per_gpu"),
        "--gradient_accumulation_steps": _option("{stage}.batch_size=64", note=_BATCH),
        "--max_seq_len": _option(
            "data.max_prompt_length=256 data.max_response_length=256", note="prompt and answer have a limit each"
        ),
        "--learning_rate": _option("{stage}.optimizer.learning_rate={value}", "1e-5"),
        "--weight_decay": _option("{stage}.optimizer.weight_decay={value}", "0.1"),
        "--num_train_epochs": _option("{stage}.epochs={value}", "1"),
        "--lr_scheduler_type": _option("{stage}.optimizer.schedule={value}", "cosine", _NEAREST, **_SCHEDULES),
        "--num_warmup_steps": _option("{stage}.optimizer.warmup_ratio=0.03", note=_WARMUP),
        "--gradient_checkpointing": _option("memory.gradient_checkpointing=true"),
        "--dropout": _none(_NO_DROPOUT)
        if stage == "dpo"
        else _option("{stage}.dropout={value}", "0.1", "without it the model's own, as there"),
        "--zero_stage": _option("memory.zero_stage={value}", "2"),
        "--lora_dim": _option("lora.rank={value} lora.alpha=1", "128", _LORA),
        "--lora_module_name": _option("lora.targets=[q_proj,v_proj]", note=_TARGETS),
        "--lora_learning_rate": _RATE,
    }


_PRINTED = _none("the terminal shows the loss, and metrics.jsonl has that of every step")
_FRONTEND: dict[str, Equivalent] = {
    "--step": _option("stage=pipeline", **{"1": "stage=sft", "2": "stage=rm", "3": "stage=ppo"}),
    "--actor-model": _opt("model=opt{}", "model=hf model.path={value}", "1.3b"),
    "--reward-model": _opt("model@reward_model=opt{}", "model@reward_model=hf reward_model.path={value}", "350m"),
    "--actor-zero-stage": _option("memory.zero_stage={value}", "2"),
    "--reward-zero-stage": _option("memory.critic.zero_stage={value}", "0", "of PPO; other stages: memory.zero_stage"),
    "--output-dir": _option("run_dir={value}", "output"),
    "--deployment-type": _option(
        "hardware=local",
        single_gpu="hardware=1xa6000",
        single_node="hardware=8xa100",
        multi_node="hardware=64xa100 launcher=pdsh launcher.hostfile=FILE",
    ),
    "--num-gpus": _option("hardware.gpus_per_node={value}", "8"),
}
_PPO: dict[str, Equivalent] = _EVERYWHERE | {
    "--unsupervised_dataset_name": _option(
        "+source@data.sources.text=hub data.sources.text.path={value} data.sources.text.format=text",
        "wikitext",
        "with {stage}.ptx.coef",
    ),
    "--unsupervised_dataset_config_name": _option(
        "data.sources.text.subset={value}", "wikitext-2-raw-v1", "after +source@data.sources.text=hub"
    ),
    "--unsup_coef": _option("{stage}.ptx.coef={value}", "27.8"),
    "--actor_model_name_or_path": _option(
        "stage=ppo stage.actor_model={value}", "RUN/sft/model", "a pipeline fills it in"
    ),
    "--critic_model_name_or_path": _option(
        "stage=ppo stage.reward_model={value}", "RUN/rm/model", "a pipeline fills it in"
    ),
    "--num_padding_at_beginning": _none("padding is masked, whatever the model"),
    "--per_device_generation_batch_size": _option(
        "rollout.batch_size_per_gpu={value}",
        "16",
        "{stage}.rollout_batch_size = this × GPUs × generation_batches",
    ),
    "--per_device_training_batch_size": _option(
        "{stage}.micro_batch_size_per_gpu={value}", "16", "{stage}.mini_batch_size is the batch of all GPUs"
    ),
    "--generation_batches": _option(
        "{stage}.rollout_batch_size=128", note="all responses of a rollout: per device × GPUs × generation_batches"
    ),
    "--gradient_accumulation_steps": _option("{stage}.mini_batch_size=64", note=_BATCH),
    "--ppo_epochs": _option("{stage}.ppo_epochs={value}", "1"),
    "--max_prompt_seq_len": _option("data.max_prompt_length={value}", "256"),
    "--max_answer_seq_len": _option("data.max_response_length={value}", "256"),
    "--actor_learning_rate": _option("{stage}.optimizer.learning_rate={value}", "9.65e-6"),
    "--critic_learning_rate": _option("{stage}.critic_optimizer.learning_rate={value}", "5e-6"),
    "--actor_weight_decay": _option("{stage}.optimizer.weight_decay={value}", "0.1"),
    "--critic_weight_decay": _option("{stage}.critic_optimizer.weight_decay={value}", "0.1"),
    "--num_train_epochs": _option("{stage}.iterations=100", note="rollouts: epochs × prompts / prompts of a rollout"),
    "--lr_scheduler_type": _option(
        "{stage}.optimizer.schedule={value} {stage}.critic_optimizer.schedule={value}",
        "cosine",
        _NEAREST,
        **{name: f"{text} {text.replace('optimizer', 'critic_optimizer')}" for name, text in _SCHEDULES.items()},
    ),
    "--num_warmup_steps": _option(
        "{stage}.optimizer.warmup_ratio=0.03 {stage}.critic_optimizer.warmup_ratio=0.03", note=_WARMUP
    ),
    "--preprocessing_num_workers": _option("data.workers={value}", "4"),
    "--enable_hybrid_engine": _option("rollout=native", note="rollout=auto, the default, takes it wherever it can"),
    "--unpin_actor_parameters": _option("rollout.gather=false"),
    "--release_inference_cache": _option("rollout.release_cache=true"),
    "--inference_tp_size": _option("rollout.tensor_parallel={value}", "2"),
    "--tp_gather_partition_size": _none("how many layers are gathered at once follows from the free memory"),
    "--offload_reference_model": _option("memory.reference.zero_stage=3 memory.reference.offload_parameters=true"),
    "--offload_reward_model": _option("memory.reward_model.zero_stage=3 memory.reward_model.offload_parameters=true"),
    "--actor_zero_stage": _option("memory.actor.zero_stage={value}", "2"),
    "--critic_zero_stage": _option(
        "memory.critic.zero_stage={value}", "2", "memory.reward_model.zero_stage, 0 or 3, is the reward model's"
    ),
    "--actor_gradient_checkpointing": _option("memory.actor.gradient_checkpointing=true"),
    "--critic_gradient_checkpointing": _option("memory.critic.gradient_checkpointing=true"),
    **dict.fromkeys(("--actor_dropout", "--critic_dropout"), _none(_NO_DROPOUT)),
    "--actor_lora_dim": _option(
        "lora.rank={value} lora.alpha=1",
        "128",
        f"{_LORA}; with lora.critic_rank=0 the critic is trained whole, as there",
    ),
    "--critic_lora_dim": _option("lora.critic_rank={value} lora.alpha=1", "64", _LORA),
    **dict.fromkeys(
        ("--actor_lora_module_name", "--critic_lora_module_name"),
        _option("lora.targets=[q_proj,v_proj]", note=_TARGETS),
    ),
    **dict.fromkeys(("--actor_lora_learning_rate", "--critic_lora_learning_rate"), _RATE),
    "--enable_ema": _option("{stage}.ema.decay=0.992"),
    "--enable_mixed_precision_lora": _none("ZeRO++ is not supported"),
    "--align_overflow": _none("in bf16 nothing overflows; in fp16 actor and critic have a loss scale each"),
    **dict.fromkeys(
        ("--print_answers", "--print_answers_interval"),
        _none("samples.jsonl and the report show answers of each evaluation; {stage}.eval_every is their interval"),
    ),
    "--enable_test_mode": _none("{stage}.iterations ends a run earlier"),
    "--test_stop_step": _option("{stage}.iterations={value}", "1"),
}

# Script → flag → what it is here. The stage of a training script is in STAGES.
DEEPSPEED_CHAT: dict[str, dict[str, Equivalent]] = {
    "train.py": _FRONTEND,  # Called e2e_rlhf.py since 2023.
    "step1_supervised_finetuning/main.py": _training("sft", "model=hf model.path={value}")
    | {
        "--sft_only_data_path": _option(
            "+source@data.sources.sft_only=hub data.sources.sft_only.path={value} data.sources.sft_only.stages=[sft]",
            "wangrui6/Zhihu-KOL",
        ),
        "--eot_token": _none("answers end with the EOS of the tokenizer or of its chat template"),
        "--print_loss": _PRINTED,
    },
    "step2_reward_model_finetuning/main.py": _training("rm", "model@reward_model=hf reward_model.path={value}")
    | {
        "--num_padding_at_beginning": _none("padding is masked, whatever the model"),
        "--eval_interval": _option("{stage}.eval_every={value}", "100"),
        "--eval_iters": _option("{stage}.eval_examples=512", note="held-out pairs, not batches of them"),
    },
    "step2_dpo_finetuning/main.py": _training("dpo", "model=hf model.path={value}")
    | {
        "--beta": _option("{stage}.beta={value}", "0.1"),
        "--label_smoothing": _option("{stage}.label_smoothing={value}", "0.1"),
        "--offload_reference_model": _PPO["--offload_reference_model"],
        "--print_loss": _PRINTED,
    },
    "step3_rlhf_finetuning/main.py": _PPO,
    "chat.py": {
        "--path": _option("python -m rlhf.chat {value}", "RUN"),
        "--max_new_tokens": _option("python -m rlhf.chat RUN --max-new-tokens {value}", "128"),
    },
}
STAGES = {
    "step1_supervised_finetuning/main.py": "sft",
    "step2_reward_model_finetuning/main.py": "rm",
    "step2_dpo_finetuning/main.py": "dpo",
    "step3_rlhf_finetuning/main.py": "ppo",
}
