"""What is said to people who come from other tools: every flag has its equivalent, and every equivalent composes."""

import pytest
from test_compose import composed

from rlhf.config.foreign import DEEPSPEED_CHAT, STAGES, Equivalent

# The arguments of DeepSpeed-Chat's own parsers.
_TRAINING = """data_path data_split data_output_path model_name_or_path per_device_train_batch_size
per_device_eval_batch_size max_seq_len learning_rate weight_decay num_train_epochs gradient_accumulation_steps
lr_scheduler_type num_warmup_steps output_dir seed local_rank gradient_checkpointing dropout offload dtype zero_stage
lora_dim lora_module_name only_optimize_lora lora_learning_rate compute_fp32_loss enable_tensorboard tensorboard_path
add_eot_token deepspeed deepspeed_config"""
_PPO = """data_path data_split data_output_path unsupervised_dataset_name unsupervised_dataset_config_name unsup_coef
actor_model_name_or_path critic_model_name_or_path num_padding_at_beginning per_device_generation_batch_size
per_device_training_batch_size generation_batches ppo_epochs max_prompt_seq_len max_answer_seq_len actor_learning_rate
critic_learning_rate actor_weight_decay critic_weight_decay num_train_epochs lr_scheduler_type
gradient_accumulation_steps num_warmup_steps output_dir seed preprocessing_num_workers local_rank enable_hybrid_engine
unpin_actor_parameters release_inference_cache inference_tp_size tp_gather_partition_size offload dtype
offload_reference_model offload_reward_model actor_zero_stage critic_zero_stage actor_gradient_checkpointing
critic_gradient_checkpointing actor_dropout critic_dropout actor_lora_dim actor_lora_module_name critic_lora_dim
critic_lora_module_name only_optimize_lora actor_lora_learning_rate critic_lora_learning_rate enable_ema
enable_mixed_precision_lora compute_fp32_loss enable_tensorboard tensorboard_path add_eot_token align_overflow
print_answers print_answers_interval enable_test_mode test_stop_step deepspeed deepspeed_config"""
FLAGS = {
    "train.py": "step actor-model reward-model actor-zero-stage reward-zero-stage output-dir deployment-type num-gpus",
    "step1_supervised_finetuning/main.py": f"{_TRAINING} sft_only_data_path eot_token print_loss",
    "step2_reward_model_finetuning/main.py": f"{_TRAINING} num_padding_at_beginning eval_interval eval_iters",
    "step2_dpo_finetuning/main.py": f"{_TRAINING} beta label_smoothing offload_reference_model print_loss",
    "step3_rlhf_finetuning/main.py": _PPO,
    "chat.py": "path max_new_tokens",
}


def test_every_flag_of_deepspeed_chat_is_in_the_table() -> None:
    assert {script: set(flags) for script, flags in DEEPSPEED_CHAT.items()} == {
        script: {f"--{flag}" for flag in flags.split()} for script, flags in FLAGS.items()
    }
    for flags in DEEPSPEED_CHAT.values():
        for flag, equivalent in flags.items():
            assert equivalent.here or equivalent.note, flag
            assert "{value}" not in equivalent.here or equivalent.example, flag


def together(script: str, stage: str, *, of_value: str | None = None) -> list[str]:
    """The arguments for all flags of a script, each key once."""
    found: dict[str, str] = {}
    for equivalent in DEEPSPEED_CHAT[script].values():
        value = of_value if of_value in equivalent.values else None
        for argument in equivalent.arguments(stage, value).split():
            found.setdefault(argument.split("=")[0], argument)
    return sorted(found.values(), key=lambda argument: not argument.startswith("+"))


@pytest.mark.parametrize("script", [script for script in DEEPSPEED_CHAT if script != "chat.py"])
def test_what_a_flag_is_here_composes(script: str) -> None:
    name = STAGES.get(script)
    chosen = [f"stage={name}"] if name and name != "ppo" else []  # Step 3's own arguments say stage=ppo.
    assert composed(*chosen, *together(script, "stage")).stage.name == (name or "pipeline")
    for value in sorted({value for flag in DEEPSPEED_CHAT[script].values() for value in flag.values}):
        alone = [
            argument
            for flag in DEEPSPEED_CHAT[script].values()
            if value in flag.values
            for argument in flag.arguments("stage", value).split()
        ]
        composed(*([f"stage={name}"] if name else []), *alone)


def test_in_a_pipeline_the_options_are_below_their_stage() -> None:
    sft = together("step1_supervised_finetuning/main.py", "stage.sft")
    ppo = [text for text in together("step3_rlhf_finetuning/main.py", "stage.ppo") if "_model=" not in text]
    found = composed(*dict.fromkeys([*sft, *(text for text in ppo if text.startswith("stage.ppo."))])).stage
    assert (found.sft.optimizer.learning_rate, found.ppo.ptx.coef) == (1e-5, 27.8)  # type: ignore[attr-defined]
    assert found.ppo.critic_optimizer.schedule.name == "cosine"  # type: ignore[attr-defined]


def test_a_value_is_carried_over() -> None:
    split = DEEPSPEED_CHAT["step1_supervised_finetuning/main.py"]["--data_split"]
    assert split.arguments("stage", "6,2,2") == "data.split.sft=6 data.split.rm=2 data.split.ppo=2"
    assert split.arguments("stage", "6") == split.arguments("stage")  # What cannot be read is shown with an example.
    step = DEEPSPEED_CHAT["train.py"]["--step"]
    assert (step.arguments("stage", "2"), step.arguments("stage", "1 2 3")) == ("stage=rm", "stage=pipeline")
    for name in ("13b", "facebook/opt-13b"):
        assert DEEPSPEED_CHAT["train.py"]["--actor-model"].arguments("stage", name) == "model=opt13b"
    assert Equivalent(note="there is none").arguments("stage", "1") == ""
