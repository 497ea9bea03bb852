"""What `vitdist doctor` finds here, and what it says of a machine that needs a mend."""

from __future__ import annotations

import os
from pathlib import Path

from tests import launching
from tests.conftest import Recipes
from tests.disks import small_disk


def doctor(world: int, words: list[str], folder: Path, **env: str) -> tuple[int, list[str]]:
    """(exit code, lines), after what must always hold: 7 exactly when a finding needs a mend."""
    codes, output = launching.run(world, ["doctor", *words], folder, env=env)
    assert len(set(codes)) == 1, output
    lines = [line for line in output.splitlines() if line.startswith(("ok ", "MEND "))]
    mends = sum(line.startswith("MEND ") for line in lines)
    assert codes[0] == (7 if mends else 0), output
    assert "Traceback" not in output and (not mends or f"{mends} finding" in output), output
    return codes[0], lines


def about(topic: str, lines: list[str]) -> list[str]:
    return [line for line in lines if line.split()[1] == topic]


def test_each_part_of_the_machine_and_of_the_recipe_has_a_line(tiny_recipe: Recipes, tmp_path: Path) -> None:
    _, lines = doctor(1, [str(tiny_recipe())], tmp_path)
    topics = {line.split()[1] for line in lines}
    assert topics == {"software", "device", "cpus", "/dev/shm", "network", "disk", "data", "weights", "batch"}
    assert "320 training samples of 200 classes" in about("data", lines)[0]
    assert "from scratch" in about("weights", lines)[0]
    assert "24 = 1 rank x micro-batch 24 x accumulation 1" in about("batch", lines)[0]
    assert "MB/s written" in about("disk", lines)[2] and "inodes" in about("disk", lines)[1]
    assert not list(tmp_path.glob("runs*")), "nothing is left behind"


def test_ranks_measure_what_is_between_them(tiny_recipe: Recipes, tmp_path: Path) -> None:
    _, lines = doctor(2, [str(tiny_recipe()), "--slurm"], tmp_path)
    host, measured = about("ranks", lines)
    assert "rank 0, 1 on CPU, 1/1 CPUs" in host
    assert "all-reduce of 32 MB over 2 ranks on 1 host by gloo: " in measured and "GB/s" in measured
    assert len(about("cpus", lines)) == 1, "a host speaks once"
    if (os.cpu_count() or 1) > 1:  # the tests give each rank one core
        assert about("cpus", lines)[0].startswith("MEND") and "--cpus-per-task" in about("cpus", lines)[0]


def test_a_batch_that_these_ranks_cannot_share_is_named(tiny_recipe: Recipes, tmp_path: Path) -> None:
    _, lines = doctor(3, [str(tiny_recipe(train__global_batch_size=26))], tmp_path)
    assert about("batch", lines)[0].startswith("MEND") and "nearest that do: 24 or 30" in about("batch", lines)[0]


def test_what_the_recipe_asks_for_and_is_not_there(tiny_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tiny_recipe(data__path="nowhere")
    _, lines = doctor(1, [str(recipe), "model.weights=absent.safetensors"], tmp_path)
    assert about("data", lines)[0].startswith("MEND") and "nowhere" in about("data", lines)[0]
    assert "no weights at absent.safetensors: give a .safetensors" in about("weights", lines)[0]


def test_a_volume_that_is_nearly_full(tiny_recipe: Recipes, tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=64m,nr_inodes=100") as disk:
        code, lines = doctor(1, [str(tiny_recipe()), f"out={disk}/run"], tmp_path)
    free, inodes, speed = about("disk", lines)
    assert code == 7 and free.startswith("MEND") and inodes.startswith("MEND")
    assert speed.startswith("MEND") and "cannot be written: No space left" in speed


def test_a_driver_that_is_too_old_for_this_torch(tiny_recipe: Recipes, tmp_path: Path) -> None:
    """The words are a real nvidia-smi's; the GPU is not there."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'NVIDIA A100-SXM4-80GB, 470.82.01, 81920, 3'\n")
    program.chmod(0o755)
    code, lines = doctor(1, [], tmp_path, PATH=f"{program.parent}:{os.environ['PATH']}")
    (driver,) = about("driver", lines)
    assert code == 7 and driver.startswith("MEND") and "470.82.01, 1 GPU: NVIDIA A100-SXM4-80GB 80 GB" in driver
    assert "or newer" in driver
    assert about("device", lines)[0].startswith("MEND") and "torch sees none" in about("device", lines)[0]


def test_an_interface_that_is_asked_for_and_is_not_there(tmp_path: Path) -> None:
    code, lines = doctor(1, [], tmp_path, GLOO_SOCKET_IFNAME="ib7")
    assert code == 7 and any("GLOO_SOCKET_IFNAME=ib7 names no interface" in line for line in about("network", lines))
