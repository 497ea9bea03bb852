"""This machine, as one process sees it: software, devices, cores, memory, shared memory, network."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from vitdist.doctor.findings import Finding

OLDEST_TORCH = (2, 11)  # torch.load(weights_only=True) ran code before (CVE-2025-32434, CVE-2026-24747)
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}  # by the CUDA that torch was built for
SMALL_SHM = 512 << 20  # docker gives 64 MB, in which loader workers die with a bus error
_SMI = ("--query-gpu=name,driver_version,memory.total,memory.used", "--format=csv,noheader,nounits")


def software() -> Finding:
    """The versions that decide what runs."""
    found = {name: metadata.version(name) for name in ("vitdist", "torch", "torchvision", "timm", "accelerate")}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    mend = (
        "" if numbers >= OLDEST_TORCH else f"install torch >= {'.'.join(map(str, OLDEST_TORCH))}: older ones run code"
    )
    return Finding("software", f"{text}, built for CUDA {torch.version.cuda or 'none'}", mend)


def devices() -> Iterator[Finding]:
    """The GPUs that the driver has, and those that torch sees."""
    listed = _driver()
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    granted = os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0")
    if listed:
        names = ", ".join(f"{name} {int(total) // 1024} GB" for name, _, total, _ in listed)
        yield Finding(
            "driver", f"{listed[0][1]}, {len(listed)} GPU{'s' * (len(listed) > 1)}: {names}", _too_old(listed[0][1])
        )
        for number, (name, _, total, used) in enumerate(listed):
            if int(used) > 0.1 * int(total) and not granted:
                yield Finding("device", f"GPU {number} ({name}) has {used} of {total} MB in use",
                              "somebody else works there; choose others with CUDA_VISIBLE_DEVICES")  # fmt: skip
    if seen:
        names = ", ".join(sorted({torch.cuda.get_device_name(number) for number in range(seen)}))
        yield Finding(
            "device", f"torch sees {seen} ({names}), bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}"
        )
    elif listed or granted:
        mend = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or 'none'}; "
        mend += (
            "see CUDA_VISIBLE_DEVICES, and --nv where a container starts python"
            if not _old(listed)
            else "a newer driver"
        )
        yield Finding("device", "there are GPUs, and torch sees none: training would stop with 7", mend)
    else:
        yield Finding("device", "no GPU: training runs on the CPU")


def _driver() -> list[list[str]]:
    """(name, driver, memory, used) of every GPU that nvidia-smi lists, in MB."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, *_SMI], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 4 and row[2].isdigit() and row[3].isdigit()]


def _old(listed: list[list[str]]) -> bool:
    return bool(listed) and bool(_too_old(listed[0][1]))


def _too_old(version: str) -> str:
    wanted = OLDEST_DRIVER.get((torch.version.cuda or "").split(".")[0], 0)
    major = version.split(".")[0]
    old = major.isdigit() and int(major) < wanted
    return (
        f"torch for CUDA {torch.version.cuda} wants driver {wanted} or newer; update it, or install a torch for it"
        if old
        else ""
    )


def cores() -> Finding:
    """The CPUs this process may use, and the memory."""
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    text = f"{usable} of {present} CPUs{_span()}, {_memory() / 2**30:.0f} GB of memory free"
    threads = os.environ.get("OMP_NUM_THREADS")
    text += f", OMP_NUM_THREADS={threads}" if threads else ""
    bound = usable == 1 < present
    mend = "one CPU must do for the rank and its loader workers: ask for more (--cpus-per-gpu=8, --cpus-per-task=8)"
    return Finding("cpus", text, mend if bound else "")


def _span() -> str:
    """The CPUs by number, where they are not all."""
    numbers = sorted(os.sched_getaffinity(0))
    if len(numbers) == (os.cpu_count() or 1):
        return ""
    return f" ({', '.join(map(str, numbers[:8]))}{', ...' if len(numbers) > 8 else ''})"


def _memory() -> int:
    """Bytes free: the system's, or what is left under a control group's limit."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return free
    return min(free, int(limit) - used) if limit.isdigit() else free


def shared_memory() -> Finding:
    """/dev/shm, through which loader workers hand over their batches."""
    try:
        state = os.statvfs("/dev/shm")
    except OSError:
        return Finding("/dev/shm", "is not there", "mount a tmpfs on it, or set data.num_workers to 0")
    free = state.f_bavail * state.f_frsize
    text = f"{free / 1e9:.1f} of {state.f_blocks * state.f_frsize / 1e9:.1f} GB free"
    return Finding("/dev/shm", text, "" if free >= SMALL_SHM else "docker run --shm-size=8g, or data.num_workers 0")


def network() -> Iterator[Finding]:
    """Interfaces that are up, what this host's name means, and whether the one that is asked for exists."""
    names = [path.name for path in sorted(Path("/sys/class/net").iterdir()) if path.name != "lo" and _is_up(path)]
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    text = f"{host} is {address or 'no address'}; up: {', '.join(map(_with_speed, names)) or 'lo alone'}"
    several = int(os.environ.get("SLURM_NNODES", "1")) > 1
    bad = several and (not address or address.startswith("127."))
    yield Finding(
        "network", text, "other nodes cannot reach that: give the host its own address in /etc/hosts" if bad else ""
    )
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        wanted = os.environ.get(variable, "").lstrip("=^").split(",")[0]
        negated = os.environ.get(variable, "").startswith("^")
        if wanted and not negated and not any(name.startswith(wanted) for name in ["lo", *names]):
            yield Finding(
                "network", f"{variable}={wanted} names no interface that is up", f"choose of {', '.join(names)}"
            )


def _is_up(interface: Path) -> bool:
    try:
        return (interface / "operstate").read_text().strip() in ("up", "unknown")
    except OSError:
        return False


def _with_speed(name: str) -> str:
    try:
        speed = int(Path(f"/sys/class/net/{name}/speed").read_text())
    except (OSError, ValueError):
        return name
    return f"{name} {speed / 1000:g} Gbit/s" if speed > 0 else name
