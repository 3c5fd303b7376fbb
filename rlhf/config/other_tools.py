"""What people write who come from other tools: transformers and TRL, accelerate, torchrun, deepspeed, OpenRLHF, verl.

The flags of DeepSpeed-Chat are in foreign.py. `*.name=…` stands for every option of the stage that is called so.
"""

import shlex
from collections.abc import Collection
from dataclasses import replace

from rlhf.config.foreign import DEEPSPEED_CHAT, STAGES, Equivalent

_MODEL = "model=hf model.path={value}"
_HUB = "data=files data.sources.main.kind=hub data.sources.main.path={value}"
_FILE = "data=files data.sources.main.path={value}"
_RATE, _BATCH, _MICRO = (
    "*.optimizer.learning_rate={value}",
    "*.batch_size={value}",
    "*.micro_batch_size_per_gpu={value}",
)
_NO_CHECKPOINTS = "!a stage that ends is kept, and the same command goes on with the next one"
_RENDEZVOUS = "!launch.py starts the ranks itself; launcher=… reaches other machines"
_RECIPE = (
    "experiment=NAME",
    "a recipe is a file DIR/experiment/NAME.yaml that begins with  # @package _global_ ; add  --config-dir DIR",
)

# Flag without dashes, `_` for `-` → arguments of launch.py, with a note if need be; "!reason": nothing to be written.
_FLAGS: dict[str, str | tuple[str, str]] = {
    # transformers, TRL
    **dict.fromkeys(("config", "config_path", "config_yaml", "recipe"), _RECIPE),
    **dict.fromkeys(("model", "model_name", "pretrain", "pretrained_model", "sft_model_path"), _MODEL),
    **dict.fromkeys(("reward_model_path", "reward_pretrain"), "stage=ppo stage.reward_model={value}"),
    **dict.fromkeys(("ref_model", "ref_pretrain"), "!the reference is the policy as it was before training"),
    **dict.fromkeys(("dataset", "dataset_name", "prompt_data", "dataset_mixer"), _HUB),
    **dict.fromkeys(("train_file", "train_data", "dataset_path", "train_files"), _FILE),
    "dataset_config": "data.sources.main.subset={value}",
    "dataset_train_split": "data.sources.main.split={value}",
    "bf16": "memory.precision=bf16",
    "fp16": "memory.precision=fp16",
    **dict.fromkeys(("torch_dtype", "mixed_precision", "model_dtype"), "memory.precision={value}"),
    **dict.fromkeys(("attn_implementation", "flash_attn"), "model.attention=flash_attention_2"),
    **dict.fromkeys(("lr", "learning_rate"), _RATE),
    "per_device_train_batch_size": _MICRO,
    **dict.fromkeys(("epochs", "num_train_epochs", "max_epochs"), "*.epochs={value}"),
    **dict.fromkeys(("num_episodes", "total_episodes"), ("*.iterations=100", "rollouts, not answers")),
    **dict.fromkeys(("warmup_ratio", "lr_warmup_ratio"), "*.optimizer.warmup_ratio={value}"),
    "warmup_steps": ("*.optimizer.warmup_ratio=0.03", "a share of the steps, not their number"),
    "lr_scheduler": "*.optimizer.schedule={value}",
    **dict.fromkeys(("max_grad_norm", "max_norm"), "*.optimizer.max_grad_norm={value}"),
    "adam_betas": "*.optimizer.betas=[0.9,0.95]",
    "optim": "!every optimizer is AdamW",
    **dict.fromkeys(
        ("max_length", "max_len", "max_seq_length"), "data.max_prompt_length=256 data.max_response_length=256"
    ),
    "prompt_max_len": "data.max_prompt_length={value}",
    **dict.fromkeys(
        ("max_completion_length", "response_length", "generate_max_len"), "data.max_response_length={value}"
    ),
    **dict.fromkeys(("num_generations", "n_samples_per_prompt"), "*.group_size={value}"),
    **dict.fromkeys(("use_peft", "lora_r", "lora_rank"), "lora.rank={value}"),
    "lora_target_modules": "lora.targets=[q_proj,v_proj]",
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "!quantised training is not supported"),
    "eval_steps": "*.eval_every={value}",
    **dict.fromkeys(("save_steps", "save_strategy", "save_total_limit", "ckpt_path"), _NO_CHECKPOINTS),
    **dict.fromkeys(("resume_from_checkpoint", "resume", "load_checkpoint"), _NO_CHECKPOINTS),
    **dict.fromkeys(("logging_steps", "logging_dir"), "!every step is in metrics.jsonl"),
    **dict.fromkeys(("report_to", "use_wandb", "log_with"), "tracking=wandb"),
    "wandb_project": "tracking.project={value}",
    **dict.fromkeys(("run_name", "save_path", "wandb_run_name", "output"), "run_dir={value}"),
    "push_to_hub": "!RUN/model is a Hugging Face directory:  hf upload ORG/NAME RUN/model",
    "trust_remote_code": "!code that comes with a model is never run",
    # torchrun, accelerate, deepspeed
    **dict.fromkeys(("nproc_per_node", "num_gpus", "num_accelerators", "gpus"), "hardware.gpus_per_node={value}"),
    "num_processes": ("hardware.gpus_per_node={value}", "of one machine; hardware.nodes is the number of machines"),
    **dict.fromkeys(("nnodes", "num_nodes", "num_machines"), "hardware.nodes={value}"),
    **dict.fromkeys(("node_rank", "machine_rank"), "launcher=no_ssh launcher.node_rank={value}"),
    **dict.fromkeys(("master_addr", "main_process_ip", "rdzv_endpoint"), "launcher.master_addr={value}"),
    **dict.fromkeys(("master_port", "main_process_port"), "launcher.master_port={value}"),
    **dict.fromkeys(("standalone", "rdzv_id", "rdzv_backend", "use_deepspeed", "multi_gpu", "module"), _RENDEZVOUS),
    "config_file": ("hardware=8xa100 memory=zero3", "what accelerate's file says are the groups hardware and memory"),
    "hostfile": "launcher=pdsh launcher.hostfile={value}",
    "include": "launcher.include={value}",
    "exclude": "launcher.exclude={value}",
    "launcher": "launcher={value}",
    # OpenRLHF
    **dict.fromkeys(("train_batch_size", "batch_size"), (_BATCH, "PPO: mini_batch_size")),
    "micro_train_batch_size": _MICRO,
    "rollout_batch_size": "*.rollout_batch_size={value}",
    "micro_rollout_batch_size": "rollout.batch_size_per_gpu={value}",
    **dict.fromkeys(("init_kl_coef", "kl_coef"), "*.kl_coef={value}"),
    "adam_offload": "memory.offload_optimizer=true",
    "normalize_reward": "scorer.normalize=running",
    "remote_rm_url": "scorer=http scorer.url={value}",
    "apply_chat_template": "!the chat template of the model, or model.chat_template, is always used",
    "input_key": "+data.sources.main.columns.prompt={value}",
    "advantage_estimator": "stage={value}",
    "actor_num_gpus_per_node": "hardware.gpus_per_node={value}",
    "vllm_num_engines": "rollout=vllm",
    "mode": "mode={value}",
}

# verl's keys → arguments; {stage} is where PPO's options are.
_ESTIMATORS = {"gae": "stage=ppo", "reinforce_plus_plus": "stage=reinforce_pp"}
_ACTOR = "actor_rollout_ref.actor"
_KEYS: dict[str, str] = {
    "trainer.n_gpus_per_node": "hardware.gpus_per_node={value}",
    "trainer.nnodes": "hardware.nodes={value}",
    "trainer.total_epochs": "{stage}.iterations=100",
    "trainer.total_training_steps": "{stage}.iterations={value}",
    "trainer.default_local_dir": "run_dir={value}",
    "trainer.project_name": "tracking.project={value}",
    "trainer.experiment_name": "run_dir=runs/{value}",
    "trainer.logger": "tracking=wandb",
    "trainer.test_freq": "{stage}.eval_every={value}",
    "trainer.critic_warmup": "{stage}.critic_warmup_iterations={value}",
    "algorithm.adv_estimator": "stage={value}",
    "algorithm.gamma": "{stage}.gamma={value}",
    "algorithm.lam": "{stage}.gae_lambda={value}",
    "algorithm.use_kl_in_reward": "{stage}.kl_placement=reward",
    "algorithm.kl_ctrl.kl_coef": "{stage}.kl_coef={value}",
    "algorithm.kl_ctrl.target_kl": "{stage}.kl_target={value}",
    "algorithm.kl_ctrl.horizon": "{stage}.kl_horizon={value}",
    "data.train_files": _FILE,
    "data.prompt_key": "+data.sources.main.columns.prompt={value}",
    "data.train_batch_size": "{stage}.rollout_batch_size={value}",
    "actor_rollout_ref.model.path": _MODEL,
    "actor_rollout_ref.model.enable_gradient_checkpointing": "memory.actor.gradient_checkpointing=true",
    f"{_ACTOR}.optim.lr": "{stage}.optimizer.learning_rate={value}",
    f"{_ACTOR}.ppo_mini_batch_size": "{stage}.mini_batch_size={value}",
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": "{stage}.micro_batch_size_per_gpu={value}",
    f"{_ACTOR}.ppo_epochs": "{stage}.ppo_epochs={value}",
    f"{_ACTOR}.clip_ratio": "{stage}.clip_range={value}",
    f"{_ACTOR}.use_kl_loss": "{stage}.kl_placement=loss",
    f"{_ACTOR}.kl_loss_coef": "{stage}.kl_coef={value}",
    "actor_rollout_ref.rollout.n": "{stage}.group_size={value}",
    "actor_rollout_ref.rollout.name": "rollout={value}",
    "actor_rollout_ref.rollout.temperature": "rollout.temperature={value}",
    "actor_rollout_ref.rollout.top_p": "rollout.top_p={value}",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": "rollout.tensor_parallel={value}",
    "critic.optim.lr": "{stage}.critic_optimizer.learning_rate={value}",
    "critic.model.path": "model@reward_model=hf reward_model.path={value}",
    "reward_model.model.path": "stage=ppo stage.reward_model={value}",
    "custom_reward_function.path": "scorer=function scorer.function={value}:NAME",
}


_POLICIES = ("ppo", "grpo", "rloo", "reinforce_pp")  # They have PPO's options.


def flag_advice(flag: str, value: str, *, stage: str, keys: Collection[str]) -> str:
    """One sentence about a flag of another tool ("" if no tool has it): what to write instead of it.

    Args:
        flag: with its dashes.
        value: what was given for it, "" for nothing.
        stage: the stage that is chosen.
        keys: the options that there are.
    """
    name = flag.lstrip("-").replace("-", "_").lower()
    found = _of_deepspeed_chat(name, stage) or _of_others(name, stage)
    if not found:
        return ""
    given = f"{flag} {value}".strip()
    written = [
        text for place, it in found for text in _spelt(it.arguments(place, shlex.quote(value) if value else None), keys)
    ]
    notes = list(dict.fromkeys(it.remark(place) for place, it in found if it.note))
    if not written:
        return f"{given}: there is no such flag, and nothing to write for it: {'; '.join(notes)}"
    remark = f" ({'; '.join(notes)})" if notes else ""
    return f"{given}: options have no dashes: write  {'  or  '.join(dict.fromkeys(written))}{remark}"


def key_advice(key: str, value: str, *, stage: str) -> str:
    """One sentence about an option that is another tool's ("" if it is none): what to write instead of it."""
    if key not in _KEYS:
        return ""
    place = "stage" if stage in _POLICIES else "stage.ppo"
    here = _ESTIMATORS.get(value, _KEYS[key]) if key.endswith("adv_estimator") else _KEYS[key]
    return f"unknown key {key}: write  {here.format(stage=place, value=shlex.quote(value))}"


def _of_deepspeed_chat(name: str, stage: str) -> list[tuple[str, Equivalent]]:
    """The equivalents of a flag, each with where its options are; those of the chosen stage's script if it has it."""
    here, elsewhere = [], []
    for script, flags in DEEPSPEED_CHAT.items():
        of = STAGES.get(script, "")
        for flag, equivalent in flags.items():
            if flag.lstrip("-").replace("-", "_") != name:
                continue
            if not of or of == stage or (of == "ppo" and stage in _POLICIES):
                here.append(("stage", equivalent))
            elif stage == "pipeline" and of != "dpo":
                here.append((f"stage.{of}", equivalent))
            else:
                chosen = f"stage={of} " if equivalent.here and "stage=" not in equivalent.here else ""
                elsewhere.append(("stage", replace(equivalent, here=chosen + equivalent.here)))
    return here or elsewhere


def _of_others(name: str, stage: str) -> list[tuple[str, Equivalent]]:
    if name not in _FLAGS:
        return []
    known = _FLAGS[name]
    here, note = known if isinstance(known, tuple) else (known, "")
    if here.startswith("!"):
        return [("stage", Equivalent(note=here[1:]))]
    return [("stage", Equivalent(here=here, note=note, example="VALUE"))]


def _spelt(arguments: str, keys: Collection[str]) -> list[str]:
    """Arguments with every `*.name` as the options that are called so; [] if there are none."""
    if not arguments.startswith("*."):
        return [arguments] if arguments else []
    name, _, value = arguments[1:].partition("=")
    return [f"{key}={value}" for key in keys if key.startswith("stage.") and key.endswith(name)]
