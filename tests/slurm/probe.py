"""What a rank would train with: prints its place, its devices and its words as one line of JSON, and ends as told."""

from __future__ import annotations

import json
import os
import socket
import sys

from vitdist.runtime.ranks import discover, export


def main() -> int:
    ranks = discover()
    environment = dict(os.environ)
    export(ranks, environment)
    report = {
        "rank": ranks.rank,
        "world": ranks.world,
        "local_rank": ranks.local_rank,
        "local_world": ranks.local_world,
        "host": socket.gethostname(),
        "master": f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}",
        "cpus": environment.get("SLURM_CPUS_PER_TASK"),
        "gpus": environment.get("CUDA_VISIBLE_DEVICES"),
        "end": environment.get("SLURM_JOB_END_TIME"),
        "site": environment.get("LAB_SITE"),
        "words": sys.argv[1:],
    }
    os.write(1, f"{json.dumps(report)}\n".encode())
    return int(os.environ.get("PROBE_CODE", "0"))


if __name__ == "__main__":
    sys.exit(main())
