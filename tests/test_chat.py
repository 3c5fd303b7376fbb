"""The conversation in the terminal, with a miniature model."""

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, PreTrainedTokenizerFast

from rlhf import chat
from rlhf.config.errors import ConfigError

ROOT = Path(__file__).parents[1]
SPECIAL = ["<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT = 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, plus the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, *, next_tokens: str | None = None) -> OPTForCausalLM:
    """A model of random weights. With `next_tokens`, one that goes through them in a circle, whatever it is asked."""
    torch.manual_seed(0)
    size = 512
    config = OPTConfig(
        vocab_size=len(tokenizer) + 8,
        hidden_size=size if next_tokens else 32,
        word_embed_proj_dim=size if next_tokens else 32,
        num_hidden_layers=0 if next_tokens else 2,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model = OPTForCausalLM(config)
    if next_tokens is None:
        return model
    cycle = tokenizer(next_tokens, add_special_tokens=False)["input_ids"]
    following = dict(zip([tokenizer.convert_tokens_to_ids("<|assistant|>"), *cycle], [*cycle, cycle[0]], strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.decoder.final_layer_norm.weight.fill_(1.0)
        for token, successor in following.items():
            model.get_input_embeddings().weight[token, token] = 1.0
            model.lm_head.weight[successor, token] = 10.0
    return model


def save(directory: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers "good film" and then EOS."""
    tokenizer = make_tokenizer()
    return save(tmp_path_factory.mktemp("scripted"), make_model(tokenizer, next_tokens="a film</s>"), tokenizer)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends an answer by itself, with a long context."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, next_tokens="ab cd")
    model.config.max_position_embeddings = 200000
    wide = OPTForCausalLM(model.config)
    state = {name: value for name, value in model.state_dict().items() if "embed_positions" not in name}
    wide.load_state_dict(state, strict=False)
    with torch.no_grad():
        wide.model.decoder.embed_positions.weight.zero_()
    return save(tmp_path_factory.mktemp("endless"), wide.bfloat16(), tokenizer)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = make_tokenizer()
    return save(tmp_path_factory.mktemp("random"), make_model(tokenizer), tokenizer)


def talk(directory: Path, *messages: str, **options: Any) -> tuple[chat.Chat, str, str]:
    """Send messages and return the chat, the answers and the notices."""
    loaded = chat.load_chat(directory, chat.Options(**options))
    output, notices = io.StringIO(), io.StringIO()
    chat.converse(loaded, iter(messages), output, notices)
    return loaded, output.getvalue(), notices.getvalue()


def test_an_answer_ends_at_eos_and_shows_no_special_token(scripted: Path) -> None:
    loaded, output, notices = talk(scripted, "hello", "again", greedy=True)
    assert output == "a film\na film\n"
    assert notices == ""
    assert [(message.role, message.content) for message in loaded.history] == [
        ("user", "hello"),
        ("assistant", "a film"),
        ("user", "again"),
        ("assistant", "a film"),
    ]


def test_reset_forgets_all_but_the_system_message(scripted: Path) -> None:
    loaded, _, notices = talk(scripted, "hello", "/reset", greedy=True, system="be kind")
    assert [(message.role, message.content) for message in loaded.history] == [("system", "be kind")]
    assert notices == "(forgotten)\n"


def test_commands_are_not_sent_to_the_model(scripted: Path) -> None:
    loaded, output, notices = talk(scripted, "/help", "/nonsense x", "", "/exit", "never read", greedy=True)
    assert output == "" and loaded.history == []
    assert "/reset" in notices and "no command /nonsense" in notices


def test_a_full_context_forgets_the_oldest_turns_and_says_so(scripted: Path) -> None:
    messages = [letter * 12 for letter in "abc"]
    loaded, output, notices = talk(scripted, *messages, greedy=True, system="s")
    assert output == "a film\n" * 3
    assert "the oldest 2 messages are forgotten" in notices
    assert [message.content for message in loaded.history] == ["s", "b" * 12, "a film", "c" * 12, "a film"]


def test_a_message_beyond_the_context_is_refused_and_left_out(scripted: Path) -> None:
    loaded, output, notices = talk(scripted, "x" * 100, "hi", greedy=True)
    assert "103 tokens" in notices and "takes 48" in notices
    assert output == "a film\n"
    assert [message.content for message in loaded.history] == ["hi", "a film"]


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(random_model: Path) -> None:
    first = talk(random_model, "hello", seed=1, max_new_tokens=12, temperature=1.0)[1]
    assert talk(random_model, "hello", seed=1, max_new_tokens=12, temperature=1.0)[1] == first
    assert talk(random_model, "hello", seed=2, max_new_tokens=12, temperature=1.0)[1] != first
    assert not any(token in first for token in SPECIAL)


def test_the_answer_is_limited(endless: Path) -> None:
    loaded, output, _ = talk(endless, "hello", greedy=True, max_new_tokens=7)
    assert output == "ab cdab\n"
    assert loaded.model.dtype is torch.bfloat16


def test_the_model_of_a_run(tmp_path: Path, scripted: Path, random_model: Path) -> None:
    run = tmp_path / "pipeline"
    shutil.copytree(random_model, run / "sft" / "model")
    assert chat.find_model(run) == run / "sft" / "model"
    write_reward_model(run / "rm" / "model")
    assert chat.find_model(run) == run / "sft" / "model"
    shutil.copytree(scripted, run / "ppo" / "model")
    assert chat.find_model(run) == run / "ppo" / "model"
    assert chat.find_model(run / "sft") == run / "sft" / "model"
    assert chat.find_model(run / "sft" / "model") == run / "sft" / "model"
    for reward_model in (run / "rm", run / "rm" / "model"):
        with pytest.raises(ConfigError, match=r"reward model.*cannot write"):
            chat.find_model(reward_model)


def write_reward_model(directory: Path) -> None:
    config = OPTConfig(
        vocab_size=16, hidden_size=8, word_embed_proj_dim=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8
    )
    OPTForSequenceClassification(config).save_pretrained(directory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing/run"], "there is no directory missing/run"),
        (["."], "holds no model that can write"),
        ([".", "--temperature", "-1"], "--temperature -1.0"),
        ([".", "--top-p", "0"], "--top-p 0.0"),
        ([".", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert chat.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.startswith("error: ") and captured.out == ""


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OPTForCausalLM"], "model_type": "opt"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="safetensors"):
        chat.load_chat(chat.find_model(tmp_path), chat.Options())


@pytest.mark.processes
def test_from_a_pipe_only_answers_are_written_to_stdout(scripted: Path) -> None:
    command = [sys.executable, "-m", "rlhf.chat", str(scripted), "--greedy"]
    done = subprocess.run(
        command, input="hello\n\n/reset\nagain\n", capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "a film\na film\n", "(forgotten)\n")


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "rlhf.chat", str(directory), "--greedy", *options]

        def take_terminal() -> None:
            import fcntl
            import termios

            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, preexec_fn=take_terminal, close_fds=True
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str, *, seconds: float = 120) -> None:
        """Read until `text` is shown, and forget what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"{text!r} was not shown: {self.shown!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.shown += os.read(self.master, 65536).decode(errors="replace")
        self.shown = self.shown.split(text, 1)[1]

    def wait_for_prompt(self) -> None:
        """Read until it asks, and really waits: Python loses a Ctrl-C between the prompt and the wait for a key."""
        self.wait_for("you> ")
        status = Path(f"/proc/{self.process.pid}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(0.01)

    def write(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.mark.processes
def test_ctrl_c_stops_the_answer_and_ctrl_d_ends(endless: Path) -> None:
    terminal = Terminal(endless, "--max-new-tokens", "100000")
    try:
        terminal.wait_for_prompt()
        terminal.write("hello\n")
        terminal.wait_for("ab cdab cdab cd")
        terminal.write("\x03")  # Ctrl-C while it answers
        terminal.wait_for_prompt()
        terminal.write("\x03")  # Ctrl-C while nothing is going on
        terminal.wait_for_prompt()
        assert terminal.process.poll() is None
        terminal.write("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.end()


@pytest.mark.processes
def test_a_reader_that_goes_away_is_not_an_error(endless: Path) -> None:
    command = [sys.executable, "-m", "rlhf.chat", str(endless), "--greedy", "--max-new-tokens", "100000"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    try:
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert process.stdout.read(5) == "ab cd"
        process.stdout.close()
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
