"""Who this process is among its peers, read from the launcher's environment, which must be whole or absent."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from vitdist.errors import UsageError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """This process's place. `launcher` is torchrun, srun or none (a single process)."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    launcher: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0


SINGLE = Ranks(0, 1, 0, 1, "none")


def discover(environment: Mapping[str, str] = os.environ) -> Ranks:
    """The ranks of torchrun or accelerate launch, of srun (one task a rank), or a single process.

    UsageError names what is missing when the launcher's variables are half set: N unconnected runs would start.
    """
    present = [name for name in LAUNCHER_VARIABLES if environment.get(name)]
    if present:
        missing = [name for name in LAUNCHER_VARIABLES if name not in present]
        if missing and not _is_single(environment, present):
            raise UsageError(
                f"{', '.join(present)} set but {', '.join(missing)} missing; start with torchrun, accelerate launch or "
                f"srun, or unset {'it' if len(present) == 1 else 'them'} for a single process"
            )
        if not missing:
            return _from_torchrun(environment)
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_srun(environment)
    return SINGLE


def _is_single(environment: Mapping[str, str], present: list[str]) -> bool:
    """Clusters often export MASTER_ADDR and MASTER_PORT everywhere; alone they claim no peers."""
    return not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(present)


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name) or default or ""
    if not text.isdigit():
        raise UsageError(f"{name} is {text!r}, not a number; start with torchrun, accelerate launch or srun")
    return int(text)


def _from_torchrun(environment: Mapping[str, str]) -> Ranks:
    world = _number(environment, "WORLD_SIZE")
    rank = _number(environment, "RANK")
    local_world = _number(environment, "LOCAL_WORLD_SIZE", str(world))
    if rank >= world:
        raise UsageError(f"RANK is {rank} but WORLD_SIZE is {world}; ranks count from 0")
    return Ranks(rank, world, _number(environment, "LOCAL_RANK"), local_world, "torchrun")


def _from_srun(environment: Mapping[str, str]) -> Ranks:
    world = _number(environment, "SLURM_STEP_NUM_TASKS")
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", "1")
    return Ranks(
        _number(environment, "SLURM_PROCID"), world, _number(environment, "SLURM_LOCALID"), world // nodes, "srun"
    )


def export(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Give torch.distributed the rendezvous that srun left implicit: first host of the step, port from the job id."""
    if ranks.launcher != "srun":
        return
    environment.setdefault("MASTER_ADDR", _first_host(environment["SLURM_STEP_NODELIST"]))
    environment.setdefault("MASTER_PORT", str(20000 + _number(environment, "SLURM_JOB_ID") % 20000))
    environment.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world),
        LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_world),
    )


def _first_host(nodelist: str) -> str:
    """The first host of Slurm's short form: node1 of node[1-4,7],extra. Not by scontrol: containers have none."""
    match = re.match(r"(?:[^,\[\]]|\[[^\[\]]*\])+", nodelist)
    if match is None:
        raise UsageError(f"cannot read the node list {nodelist!r}; set MASTER_ADDR to the first host")
    return re.sub(r"\[([^],-]*)[^\]]*\]", r"\1", match[0])
