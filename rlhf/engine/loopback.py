"""How ranks meet where all of them run on one machine: over the loopback interface, which no other machine reaches."""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import register_rendezvous_handler

from rlhf.config.errors import ConfigError

INIT_METHOD = "loopback://"
ADDRESS = "127.0.0.1"
_INTERFACES = ("lo", "lo0")


def on_one_machine() -> bool:
    """Whether the launcher has started all ranks of this job on this machine."""
    return os.environ.get("LOCAL_SIZE", "") == os.environ.get("WORLD_SIZE", "?")


def stay_on_loopback() -> str:
    """Keep everything that ranks listen on to the loopback interface and return the init_method by which they meet.

    torch's own rendezvous listens on all interfaces, whatever MASTER_ADDR is; gloo and NCCL on the one that they find
    first, and vLLM takes this machine's outer address. Variables that are set already are a user's choice, and stay.
    """
    os.environ["MASTER_ADDR"] = ADDRESS
    present = {name for _, name in socket.if_nameindex()}
    interface = next((name for name in _INTERFACES if name in present), None)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    os.environ.setdefault("VLLM_HOST_IP", ADDRESS)
    with contextlib.suppress(RuntimeError):  # Registered before: a process may leave a group and join another one.
        register_rendezvous_handler(INIT_METHOD.partition(":")[0], _meet)  # type: ignore[no-untyped-call]
    return INIT_METHOD


def listen(port: int) -> socket.socket:
    """A socket that listens on the loopback interface only. Raises ConfigError if the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # A former run's closed connections do not count.
    try:
        listener.bind((ADDRESS, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"launcher.master_port={port}: rank 0 cannot listen there: {error.strerror}; give another port, or none "
            "for a free one"
        ) from error
    return listener


def _meet(url: str, timeout: timedelta = default_pg_timeout, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """The store through which the ranks find each other, as torch's `env://` makes it, but for where it listens."""
    rank, ranks, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    # The store closes the socket that it is given.
    descriptor = listen(port).detach() if rank == 0 else None
    store = TCPStore(ADDRESS, port, ranks, rank == 0, timeout=timeout, multi_tenant=True, master_listen_fd=descriptor)
    yield store, rank, ranks
    raise RuntimeError("ranks meet once")
