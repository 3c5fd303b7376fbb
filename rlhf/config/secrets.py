"""What must not be shown: values whose names say that they are secrets."""

import re

# What names end with whose values are secrets: HF_TOKEN, WANDB_API_KEY, DB_PASSWORD.
_SECRET_ENDS = {"KEY", "APIKEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASS", "PAT", "AUTH"}
_SECRET_ENDS |= {"CREDENTIAL", "CREDENTIALS"}


def names_secret(name: str) -> bool:
    """Whether a variable's name says that its value is a secret: HF_TOKEN, but not TOKENIZERS_PARALLELISM.

    The option `key` is none: it names the option that mode=explain explains.
    """
    words = [word for word in re.split(r"[^A-Z]+", name.rpartition(".")[2].upper()) if word]
    return name.rpartition(".")[2] != "key" and bool(words) and words[-1] in _SECRET_ENDS


def without_secrets(text: str) -> str:
    """A text without the values in NAME=value, NAME=value,value and --NAME value that their names call secret."""
    text = re.sub(
        r"(--?[A-Za-z][\w-]*) ([^\s,;:\"']+)",
        lambda found: f"{found[1]} ***" if names_secret(found[1].replace("-", "_")) else found[0],
        text,
    )
    return re.sub(
        r"([\w.]+)=([^\s,;\"'=]+(?:,[^\s,;\"'=]+(?![^\s,;\"']*=))*)(?=[\s,;\"']|$)",
        lambda found: f"{found[1]}=***" if names_secret(found[1]) else found[0],
        text,
    )
