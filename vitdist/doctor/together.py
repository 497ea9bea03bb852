"""What ranks are together: where each one is, and how fast they add up a tensor.

`python -m vitdist.doctor.together` under a launcher prints the measurement of rank 0 as one JSON line.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from vitdist.doctor.findings import Finding
from vitdist.runtime.engine import Engine
from vitdist.runtime.ranks import discover

GPU_BYTES, CPU_BYTES = 256 << 20, 32 << 20
ROUNDS = 5
MEET_SECONDS = 60.0
SLOW_NETWORK, SLOW_NVLINK = 0.1e9, 1e9  # bytes a second: about a gigabit; less than any PCIe slot


def meet() -> Engine:
    """Join the ranks of this launcher. Collective."""
    return Engine(discover(), precision="fp32", timeout_seconds=MEET_SECONDS, deterministic=False)


def measure(engine: Engine) -> dict[str, Any]:
    """Seconds of an all-reduce, the median of some, and between whom. Collective."""
    num_bytes = GPU_BYTES if engine.device.type == "cuda" else CPU_BYTES
    tensor = torch.zeros(num_bytes // 4, device=engine.device)
    seconds = []
    for _ in range(ROUNDS + 1):
        engine.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    hosts = {place["host"] for place in places(engine)}
    return {
        "seconds": statistics.median(seconds[1:]), "bytes": num_bytes, "world": engine.world, "hosts": len(hosts),
        "backend": dist.get_backend(),
    }  # fmt: skip


def bandwidth(found: dict[str, Any]) -> Finding:
    """Bytes a second and rank in each direction, as NCCL's own tests count them."""
    share = 2 * (found["world"] - 1) / found["world"]
    speed = found["bytes"] * share / found["seconds"]
    where = f"{found['world']} ranks on {found['hosts']} host{'s' * (found['hosts'] > 1)}"
    text = (
        f"all-reduce of {found['bytes'] >> 20} MB over {where} by {found['backend']}: {found['seconds'] * 1e3:.0f} ms"
    )
    slow = speed < (SLOW_NETWORK if found["backend"] == "gloo" else SLOW_NVLINK)
    mend = (
        "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME choose the interface (site.sh); NCCL_DEBUG=INFO says which is used"
    )
    return Finding("ranks", f"{text}, {speed / 1e9:.2f} GB/s each way", mend if slow else "")


def between_local_ranks() -> Finding:
    """The same between ranks started here: one a GPU, else two on the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_STEP")}
    if gpus < 2:
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={max(2, gpus)}",
               "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "vitdist.doctor.together"]  # fmt: skip
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * MEET_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding("ranks", f"two processes of this machine did not meet in {2 * MEET_SECONDS:.0f} s",
                       "see the interface above; NCCL_DEBUG=INFO or GLOO_SOCKET_IFNAME=lo say more")  # fmt: skip
    answers = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not answers:
        said = next((line.strip() for line in done.stderr.splitlines() if "Error" in line), "no word")
        return Finding("ranks", f"two processes of this machine cannot add up a tensor: {said}",
                       "train one rank until that is mended; NCCL_DEBUG=INFO says more")  # fmt: skip
    return bandwidth(json.loads(answers[-1]))


# ---- where each rank is


def places(engine: Engine) -> list[dict[str, Any]]:
    """Host, device and CPUs of every rank. Collective."""
    cuda = engine.device.type == "cuda"
    own = {
        "host": socket.gethostname(),
        "device": str(torch.cuda.get_device_properties(engine.device).uuid) if cuda else "cpu",
        "name": torch.cuda.get_device_name(engine.device) if cuda else "CPU",
        "cpus": sorted(os.sched_getaffinity(0)),
    }
    return engine.gather_json(own)


def by_host(found: list[dict[str, Any]]) -> Iterator[Finding]:
    """A line a host: its ranks, what they have, and whether they share what they should not."""
    for host in dict.fromkeys(place["host"] for place in found):
        here = [(rank, place) for rank, place in enumerate(found) if place["host"] == host]
        devices = [place["device"] for _, place in here if place["device"] != "cpu"]
        cpus = {cpu for _, place in here for cpu in place["cpus"]}
        mend = ""
        if len(set(devices)) < len(devices):
            mend = "ranks share a GPU: start one rank a GPU, without --gpus-per-task and --gpu-bind"
        elif len(cpus) < len(here) * (2 if devices else 1):
            mend = "too few CPUs for so many ranks: --cpus-per-task, and SRUN_CPUS_PER_TASK for srun"
        ranks = ", ".join(str(rank) for rank, _ in here)
        names = ", ".join(sorted({place["name"] for _, place in here}))
        each = "/".join(str(len(place["cpus"])) for _, place in here)
        yield Finding("ranks", f"{host}: rank {ranks} on {names}, {each} CPUs ({len(cpus)} distinct)", mend)


def main() -> int:
    engine = meet()
    found = measure(engine)
    if engine.is_main:
        print(json.dumps(found), flush=True)
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
