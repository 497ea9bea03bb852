"""W&B with the real library: offline, unreachable, refused, frozen and killed; training never waits for it."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vitdist.tracking import WandbTracker, redact

pytest.importorskip("wandb")
KEY = "0123456789abcdef0123456789abcdef01234567"
TRAINER = """
import logging, os, sys, time
from pathlib import Path
from vitdist.tracking import WandbTracker
logging.basicConfig(level=logging.INFO)
tracker = WandbTracker("offline", Path(sys.argv[1]), name="killed", config={"seed": 1})
for step in range(1, 50):
    tracker.log({"train/loss": 1 / step}, step)
print(tracker._process.pid, tracker._scratch, flush=True)
if sys.argv[2] == "kill":
    time.sleep(60)
tracker.finish()
"""


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "settings"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _records(folder: Path) -> list[Any]:
    """All records of the only .wandb file below: 32 KiB blocks of chunks of records (LevelDB's log)."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    (path,) = sorted(folder.glob("wandb/*run-*/*.wandb"))
    data, place, parts, records = path.read_bytes(), 7, b"", []
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def _history(folder: Path) -> list[dict[str, Any]]:
    lines = [record.history.item for record in _records(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in items} for items in lines]


def _train(tracker: WandbTracker, steps: int, first: int = 1) -> float:
    """Log `steps` lines and return the longest that a single one took."""
    longest = 0.0
    for step in range(first, first + steps):
        start = time.monotonic()
        tracker.log({"train/loss": 1 / step, "lr": 1e-4}, step)
        longest = max(longest, time.monotonic() - start)
    return longest


def _processes(tracker: WandbTracker) -> int:
    assert tracker._process is not None
    return tracker._process.pid


def _gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def _wandb_processes() -> list[str]:
    lines = subprocess.run(["ps", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if "wandb-core" in line and "--pid" in line]


@contextmanager
def _deaf_server() -> Iterator[str]:
    """An address that accepts connections and never answers: a network that swallows everything."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        taken: list[socket.socket] = []
        server.settimeout(0.2)
        over = threading.Event()

        def accept() -> None:
            while not over.is_set():
                try:
                    taken.append(server.accept()[0])
                except TimeoutError:
                    continue

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        over.set()
        thread.join()
        for connection in taken:
            connection.close()


def test_offline_run_holds_every_line_on_its_own_axis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tracker = WandbTracker("offline", tmp_path, project="p", name="a b", config={"optimizer": {"lr": 1e-4}})
    run_id = tracker.run_id
    longest = _train(tracker, 2000)
    tracker.summary({"test/accuracy/species": 0.875})
    tracker.finish()
    assert longest < 0.5 and tracker.num_dropped == 0
    history = _history(tmp_path)
    assert [line["step"] for line in history] == list(range(1, 2001))
    assert history[6]["train/loss"] == 1 / 7
    records = _records(tmp_path)
    (run,) = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.display_name, run.project) == (run_id, "a b", "p")
    axes = {r.metric.glob_name: r.metric.step_metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert axes["*"] == "step"
    assert "wandb sync" in caplog.text and len(caplog.records) == 1


def test_a_trainer_with_many_open_files_loses_no_line(tmp_path: Path) -> None:
    many = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        tracker = WandbTracker("offline", tmp_path)
        assert tracker._to > 1024  # beyond what select() can be asked about
        _train(tracker, 10)
        tracker.finish()
    finally:
        for descriptor in many:
            os.close(descriptor)
    assert len(_history(tmp_path)) == 10


def test_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first = WandbTracker("offline", tmp_path / "one")
    (tmp_path / "one").mkdir()
    _train(first, 10)
    first.finish()
    second = WandbTracker("offline", tmp_path / "two", run_id=first.run_id)
    _train(second, 5, first=8)  # steps 8 to 10 come again
    second.finish()
    assert second.run_id == first.run_id
    assert [line["step"] for line in _history(tmp_path / "two")] == [8, 9, 10, 11, 12]
    assert _history(tmp_path / "one")[-1]["step"] == 10


@pytest.mark.parametrize("network", ["refused", "deaf", "short key", "no key"])
def test_online_without_an_answer_goes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, network: str
) -> None:
    with _deaf_server() as deaf:
        monkeypatch.setenv("WANDB_BASE_URL", deaf if network == "deaf" else "http://127.0.0.1:9")
        if network != "no key":
            monkeypatch.setenv("WANDB_API_KEY", "short!" if network == "short key" else KEY)
        start = time.monotonic()
        tracker = WandbTracker("online", tmp_path, init_seconds=4.0)
        process = _processes(tracker)
        assert time.monotonic() - start < 1.0
        assert _train(tracker, 300) < 0.5
        tracker.finish(timeout=25)
    assert time.monotonic() - start < 20
    assert tracker.state == "offline" and _gone(process)
    folder = next(path for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert (warning := caplog.records[-1].getMessage()).count("wandb sync") == 1 and str(folder) in warning
    for path in (tmp_path / "wandb").rglob("run-*.wandb"):
        if path.parent != folder:
            path.unlink()  # what the failed attempt began
    assert len(_history(tmp_path)) == 300
    assert KEY not in caplog.text


def test_absent_library_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hide = tmp_path / "hide" / "wandb"
    hide.mkdir(parents=True)
    (hide / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')\n")
    monkeypatch.setenv("PYTHONPATH", str(hide.parent))
    tracker = WandbTracker("online", tmp_path)
    _train(tracker, 50)
    tracker.finish()
    assert tracker.state == "failed" and len(caplog.records) == 1
    assert "No module named 'wandb'" in caplog.text and "training goes on" in caplog.text


def test_frozen_process_never_holds_the_training_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vitdist.tracking.MAX_PENDING", 100_000)
    tracker = WandbTracker("offline", tmp_path)
    process = _processes(tracker)
    os.kill(process, signal.SIGSTOP)
    assert _train(tracker, 5000) < 0.5
    assert tracker.num_dropped > 0
    start = time.monotonic()
    tracker.finish(timeout=2)
    assert time.monotonic() - start < 4 and _gone(process)
    assert f"lacks {tracker.num_dropped} lines" in caplog.text


def test_crashed_process_is_no_matter(tmp_path: Path) -> None:
    tracker = WandbTracker("offline", tmp_path)
    _train(tracker, 10)
    os.kill(_processes(tracker), signal.SIGKILL)
    _train(tracker, 1000)
    tracker.finish(timeout=5)


def test_nothing_is_left_when_the_training_is_killed(tmp_path: Path) -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path), "kill"], stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    pid, scratch = trainer.stdout.readline().split()
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not (_gone(int(pid)) and not Path(scratch).exists()):
        time.sleep(0.1)
    assert _gone(int(pid)) and not Path(scratch).exists()
    assert not [line for line in _wandb_processes() if scratch in line]
    assert len(_history(tmp_path)) == 49


def test_secrets_are_in_no_file_and_no_line(tmp_path: Path) -> None:
    secrets = {"WANDB_API_KEY": KEY, "HF_TOKEN": "hf_plantedplanted", "AWS_SECRET_ACCESS_KEY": "AKplantedSECRET"}
    outcome = subprocess.run(
        [sys.executable, "-c", TRAINER, str(tmp_path), "end"],
        env={**os.environ, **secrets},
        capture_output=True,
        text=True,
        check=True,
    )
    said = outcome.stdout + outcome.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(_history(tmp_path)) == 49 and len(files) >= 5
    for secret in secrets.values():
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_home_is_not_needed(tmp_path: Path) -> None:
    environ = {key: value for key, value in os.environ.items() if key not in ("HOME", "WANDB_CONFIG_DIR")}
    folder = tmp_path / "ein Ordner für alles"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", TRAINER, str(folder), "end"], env=environ, check=True, capture_output=True)
    assert len(_history(folder)) == 49


@pytest.mark.parametrize(
    ("recipe", "variable", "used"),
    [("offline", "online", "offline"), ("online", "disabled", "disabled"), ("disabled", "online", "disabled")],
)
def test_the_stricter_of_recipe_and_environment_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, variable: str, used: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", variable)
    tracker = WandbTracker(recipe, tmp_path)
    assert tracker.mode == used
    tracker.finish(timeout=5)
    assert tracker.state == ("offline" if used == "offline" else "starting")


def test_redact_blots_secrets_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "very-secret")
    assert redact("bad key very-secret\n given") == "bad key *** given"
