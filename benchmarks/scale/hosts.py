"""Several hosts on one machine: network namespaces with their own addresses, joined by a bridge in another one."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_NUMBERS = itertools.count()
PORT = 29400


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str | None:
    """Return why hosts can't be created here, or None if they can."""
    if shutil.which("ip") is None:
        return "iproute2 isn't installed"
    try:
        with hosts(1):
            return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces aren't allowed here: {error.stderr.strip()}"


@dataclass
class Host:
    """A host; its processes only see its own network."""

    name: str
    switch: str
    number: int
    started: list["subprocess.Popen[str]"] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"10.213.0.{self.number + 1}"

    def start(self, *command: object, log: Path, **environment: str) -> "subprocess.Popen[str]":
        """Start a command on this host; its output goes to a file."""
        own = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"} | environment
        with log.open("w") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *map(str, command)], env=own, stdout=out, stderr=out, text=True
            )
        self.started.append(process)
        return process

    def torchrun(
        self, *command: object, log: Path, nodes: str, meeting: str, **environment: str
    ) -> "subprocess.Popen[str]":
        """Start torchrun with one torchrelay process, which joins the rendezvous at an address."""
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *self.rendezvous(nodes, meeting),
            "-m",
            "--",
            "torchrelay",
        ]
        return self.start(*run, *command, log=log, **environment)

    def rendezvous(self, nodes: str, meeting: str) -> list[str]:
        """Return torchrun's rendezvous options for one process per host."""
        options = ["--nproc-per-node", "1", "--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-id", "hosts"]
        options += ["--rdzv-endpoint", f"{meeting}:{PORT}", "--local-addr", self.address, "--max-restarts", "3"]
        store = f"is_host={int(meeting == self.address)}"  # torchrun would compare host names, which are all the same
        options += ["--rdzv-conf", f"{store},last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=2"]
        return options

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more, and no connection is closed."""
        ip("-n", self.switch, "link", "set", f"port{self.number}", "down")

    def slow(self, megabits: int) -> None:
        """Limit the host's outgoing bandwidth."""
        options = ["rate", f"{megabits}mbit", "burst", "32kbit", "latency", "50ms"]
        command = ["ip", "netns", "exec", self.name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *options]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def kill(self) -> None:
        """Kill all of its processes."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True).stdout
        for pid in map(int, pids.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        for process in self.started:
            process.wait()


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Create hosts, and remove them with all their processes.

    Raises:
        CalledProcessError: hosts can't be created here.
    """
    prefix = f"tr{os.getpid()}-{next(_NUMBERS)}"
    switch, made = f"{prefix}-switch", [f"{prefix}-switch"]
    found = [Host(f"{prefix}-{number}", switch, number) for number in range(count)]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for host in found:
            ip("netns", "add", host.name)
            made.append(host.name)
            port = f"port{host.number}"
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield found
    finally:
        for host in found:
            if host.name in made:
                host.kill()
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
