"""Ranks of one machine are heard on that machine only."""

import os

import psutil
import pytest
import torch
import torch.distributed as dist

from rlhf.config.errors import ConfigError
from rlhf.engine.loopback import listen, on_one_machine, stay_on_loopback
from rlhf.launcher.command import free_port


def listeners() -> set[str]:
    """The addresses that this process listens on."""
    connections = psutil.Process().net_connections()
    return {entry.laddr.ip for entry in connections if entry.status == psutil.CONN_LISTEN}


def test_a_process_group_listens_on_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    before = listeners()
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1", "MASTER_PORT": str(free_port())}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "VLLM_HOST_IP"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert on_one_machine()
    dist.init_process_group("gloo", init_method=stay_on_loopback())
    try:
        group = dist.new_group([0])
        values = torch.ones(3)
        dist.all_reduce(values, group=group)
        assert values.tolist() == [1.0, 1.0, 1.0]
        assert listeners() - before == {"127.0.0.1"}
        assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
        assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("local", "world", "one"), [("2", "2", True), ("2", "4", False), (None, "2", False), (None, None, False)]
)
def test_only_the_launcher_knows_that_all_ranks_are_here(
    monkeypatch: pytest.MonkeyPatch, local: str | None, world: str | None, one: bool
) -> None:
    for name, value in (("LOCAL_SIZE", local), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    assert on_one_machine() is one


def test_a_port_in_use_is_told_with_its_option() -> None:
    with listen(0) as listener:
        port = listener.getsockname()[1]
        assert listener.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match=rf"launcher\.master_port={port}: .*already in use"):
            listen(port)
    listen(port).close()
