"""The door itself: where local ranks listen, and the launcher that users bring."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from shardstep.collectives.news import packed, unpacked
from shardstep.launch import run_local

ROOT = Path(__file__).parents[1]
LISTENING = "0A"


def listening_addresses() -> list[str]:
    """The local addresses, as Linux prints them in hex, on which this process listens for TCP."""
    sockets = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)}
    inodes = {found[1] for link in sockets if (found := re.fullmatch(r"socket:\[(\d+)\]", link))}
    addresses = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                addresses.append(fields[1].rpartition(":")[0])
    return addresses


def _is_link(fd: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{fd}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_local_ranks_listen_on_loopback_only(monkeypatch):
    others = [name for _, name in socket.if_nameindex() if name != "lo"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", others[-1] if others else "none")  # where they would listen else
    loopback = {"0100007F", "00000000000000000000000001000000"}
    for addresses in run_local(listening_addresses, 2):
        assert addresses
        assert set(addresses) <= loopback


def example(*command: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, *command, "examples/train_gpt.py", "--stage", "3", "--steps", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("text", ["\U0001f600" * 700, "x" * 20_000, "lone \udcff"])
def test_news_fit_into_a_message_whatever_their_text(text):
    told = unpacked(packed({"kind": "failed", "rank": 1, "text": text, "mismatch": False}))
    assert (told["kind"], told["rank"]) == ("failed", 1)
    assert text.startswith(told["text"].removesuffix("?"))
    assert told["text"]


def test_the_example_gives_the_same_bits_under_torchrun_and_alone():
    alone = example()
    launched = example("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert (alone["world_size"], launched["world_size"]) == (1, 2)
    assert alone["sha256"] == launched["sha256"]
    assert launched["peak_bytes"] == launched["formula_bytes"]
