"""A real Slurm cluster inside one machine, for tests: a login host with the controller, and compute nodes.

Every host is a set of Linux namespaces with its own name, address, processes and /run, joined by a bridge that only
they see; nothing outside is changed. A host's first process reads from a pipe that this process holds: when the tests
end, however they end, the pipe closes and the kernel ends the host with everything on it. Needs root; up in a second.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin"])
LOGIN = "login"
NUM_GPUS, NUM_CPUS = 2, 16  # per node; sold, not there
# preemptible partitions by what Slurm does to their jobs, and the seconds it gives them
PREEMPTIBLE = {f"{mode}{grace}": (mode, grace) for mode in ("requeue", "cancel") for grace in (0, 20)}

_CONF = """
ClusterName=lab
SlurmctldHost={login}(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits (120 s by default, 5 at least)
AuthInfo=socket=/run/munge.sock,cred_expire=5
StateSaveLocation=/run/state
SlurmdSpoolDir=/run/spool
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={log}/slurmctld.log
SlurmdLogFile={log}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=10
SlurmdTimeout=10
MessageTimeout=5
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node[1-{num_nodes}] CPUs={cpus} RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 PreemptMode=OFF
PartitionName=urgent Nodes=ALL PriorityTier=100 PreemptMode=OFF
"""

# the first process of a host: waits to be wired, becomes the host, and ends with its standard input
_INIT = """
read -r _
hostname "$1"
mount -t tmpfs tmpfs /run
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$2/etc" /etc/slurm
mount --bind "$2/hosts" /etc/hosts
mkdir /run/state /run/spool
ip link set lo up
ip addr add "$3/24" dev "$4"
ip link set "$4" up
munged --force --key-file="$2/munge.key" --socket=/run/munge.sock --pid-file=/run/munged.pid \
  --seed-file=/run/munged.seed --log-file="$2/log/$1.munged.log"
$5
while read -r _; do :; done
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root (namespaces)"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"no {', '.join(absent)}; apt-get install slurmctld slurmd slurm-client munge iproute2"
    probe = subprocess.run(["unshare", "-m", "-n", "-p", "-f", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here: {probe.stderr.strip()}" if probe.returncode else None


@dataclass
class Host:
    """A running host: `keeper` holds the pipe, `pid` is the first process of its namespaces."""

    keeper: subprocess.Popen[bytes]
    pid: int

    def enter(self, *command: str, cwd: Path | None = None) -> list[str]:
        """The command line that runs `command` on this host."""
        folder = [f"--wdns={cwd}"] if cwd else []
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", *folder, "--", *command]


class Cluster:
    """A controller and `num_nodes` nodes, started by `with`. All files but /run and /dev/shm are shared."""

    def __init__(self, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            for name in [LOGIN, *self.nodes]:
                self.boot(name)
            self.until(self.is_idle, 30, "the nodes to become idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.hosts)):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]

    # ---- hosts

    def boot(self, name: str) -> None:
        """Start a host and its daemons."""
        number = 1 if name == LOGIN else 10 + int(name.removeprefix("node"))
        interface = "br0" if name == LOGIN else "eth0"
        daemon = "slurmctld" if name == LOGIN else f"slurmd -N {name}"
        command = ["unshare", "-m", "-u", "-i", "-n", "-p", "-f", "--kill-child", "--mount-proc"]
        arguments = [name, str(self.folder), f"10.77.0.{number}", interface, daemon]
        with open(self.folder / "log" / f"{name}.init.log", "ab") as log:
            keeper = subprocess.Popen(
                [*command, "--propagation", "private", "bash", "-c", _INIT, "init", *arguments],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
                env={"PATH": SEARCH, "HOME": "/root", "LANG": "C.UTF-8"},
            )  # fmt: skip
        self.hosts[name] = host = Host(keeper, _first_child(keeper.pid))
        self._wire(name, host)
        assert keeper.stdin is not None
        keeper.stdin.write(b"go\n")
        keeper.stdin.flush()

    def _wire(self, name: str, host: Host) -> None:
        """The bridge of the login host, or a cable from a node to it."""
        if name == LOGIN:
            _run([*self._switch(), "add", "br0", "type", "bridge"])
            return
        _run([*self._switch(), "add", name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)])
        _run([*self._switch(), "set", name, "master", "br0", "up"])

    def kill(self, name: str) -> None:
        """Power loss: the cable first, so that nobody hears a farewell, then every process at once."""
        host = self.hosts.pop(name)
        if name != LOGIN:
            subprocess.run([*self._switch(), "del", name], check=False)
        os.kill(host.pid, signal.SIGKILL)
        host.keeper.communicate(timeout=20)

    def cut(self, name: str) -> None:
        """Cut a node's network."""
        _run([*self._switch(), "set", name, "down"])

    def heal(self, name: str) -> None:
        _run([*self._switch(), "set", name, "up"])

    def _switch(self) -> list[str]:
        return ["nsenter", "-t", str(self.hosts[LOGIN].pid), "-n", "ip", "link"]

    # ---- Slurm's commands

    def call(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Output of a command on the login host; AssertionError with its words when it fails."""
        line = self.hosts[LOGIN].enter(*command, cwd=cwd or self.folder)
        done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, **(env or {})})
        assert done.returncode == 0, f"{shlex.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def try_call(self, *command: str) -> None:
        """The same where it may come too late, to a job that has just started or ended."""
        subprocess.run(self.hosts[LOGIN].enter(*command, cwd=self.folder), capture_output=True)

    def queue(self) -> list[str]:
        """The jobs that run, wait or end, an array's by its own id."""
        return self.call("squeue", "-h", "-o", "%F").split()

    def sbatch(self, *words: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submit; the job id."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, env=env)

    def show(self, job: str) -> dict[str, str]:
        """What the controller knows of a job (of the first one of an array)."""
        words = self.call("scontrol", "show", "job", "-o", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def until(self, true: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait for something; AssertionError with the controller's last words when it does not come."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.last_words()}"
            time.sleep(0.1)

    def last_words(self) -> str:
        logs = [self.folder / "log" / "slurmctld.log"]
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-15:]) for log in logs)

    def is_idle(self) -> bool:
        command = self.hosts[LOGIN].enter("sinfo", "-h", "-N", "-p", "normal", "-o", "%t")
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        return done.stdout.split() == ["idle"] * self.num_nodes

    # ---- configuration

    def _configure(self) -> None:
        etc, log = self.folder / "etc", self.folder / "log"
        for folder in (etc, log):
            folder.mkdir()
        self.folder.chmod(0o755)
        conf = _CONF.format(login=LOGIN, log=log, num_nodes=self.num_nodes, cpus=NUM_CPUS, gpus=NUM_GPUS)
        for name, (mode, grace) in PREEMPTIBLE.items():
            conf += f"PartitionName={name} Nodes=ALL PriorityTier=1 PreemptMode={mode.upper()} GraceTime={grace}\n"
        (etc / "slurm.conf").write_text(conf)
        (etc / "gres.conf").write_text(f"NodeName=node[1-{self.num_nodes}] Name=gpu File={self._devices()}\n")
        addresses = {LOGIN: 1, **{name: 11 + index for index, name in enumerate(self.nodes)}}
        # the mapped address spares torch's reverse look-up a warning
        lines = [f"{prefix}10.77.0.{last} {name}" for name, last in addresses.items() for prefix in ("", "::ffff:")]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

    def _devices(self) -> str:
        """GPUs must be devices: these are copies of /dev/null."""
        for number in range(NUM_GPUS):
            os.mknod(self.folder / f"gpu{number}", 0o20666, os.makedev(1, 3))
        return f"{self.folder}/gpu[0-{NUM_GPUS - 1}]"


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"


def _first_child(parent: int) -> int:
    """The process id, out here, of the first process of a new pid namespace, once it is the shell."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    for _ in range(500):
        words = children.read_text().split()
        if words and Path(f"/proc/{words[0]}/comm").read_text().strip() == "bash":
            return int(words[0])
        time.sleep(0.01)
    raise AssertionError("the namespaces of a host did not start")
