"""A copy of the metrics at Weights & Biases that can neither stop nor slow the training.

W&B lives in a process of its own (`python -m vitdist.tracking`), fed through a pipe that is never waited for: a hanging
init, a lost network or a crash over there cannot stop, slow or fork into the training. Without a network the copy goes
to an offline folder, for `wandb sync` later.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MODES = ("disabled", "offline", "online")  # in order of how much leaves the machine
MAX_PENDING = 8 << 20  # bytes kept for a W&B process that does not read; what is over is dropped and counted
INIT_SECONDS = 20.0
_CONFIG = "VITDIST_WANDB"


def redact(text: str) -> str:
    """The text on one line, at most 300 characters, with the values of secret-looking variables blotted out."""
    for name, value in os.environ.items():
        if len(value) >= 6 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSW", "CREDENTIAL")):
            text = text.replace(value, "***")
    return " ".join(text.split())[:300]


class WandbTracker:
    """A copy of the metrics at Weights & Biases that can neither stop nor slow the training.

    `run_id` is chosen here and known at once, so that a checkpoint can hold it; hand it in again to go on with a run.
    The variables of WANDB_* hold, but for the folder, which is `folder`/wandb; WANDB_MODE can only make it stricter.
    """

    def __init__(
        self,
        mode: str,
        folder: Path,
        *,
        project: str | None = None,
        name: str | None = None,
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
        init_seconds: float = INIT_SECONDS,
    ) -> None:
        self.mode = _strictest(mode)
        self.run_id = run_id or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        self.num_dropped = 0
        self.state = "starting"
        self._pending = bytearray()
        self._news = bytearray()
        self._process: subprocess.Popen[bytes] | None = None
        if self.mode != "disabled":
            self._start(
                {
                    "mode": self.mode,
                    "project": project or os.environ.get("WANDB_PROJECT") or "vitdist",
                    "name": name,
                    "id": self.run_id,
                    "dir": str(folder.resolve()),
                    "config": dict(config or {}),
                    "init_seconds": init_seconds,
                }
            )

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Hand one line over without waiting; dropped, and counted, when W&B does not keep up."""
        self._send({"log": {**values, "step": step}})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final numbers of the run."""
        self._send({"summary": dict(values)})

    def finish(self, timeout: float = 30.0, exit_code: int = 0) -> None:
        """Close the run at W&B, or give up after `timeout` seconds; none of its processes is left either way."""
        if self._process is None:
            return
        deadline = time.monotonic() + timeout
        self._pending += json.dumps({"finish": exit_code, "seconds": max(1.0, timeout - 5)}).encode() + b"\n"
        while self._process.poll() is None and time.monotonic() < deadline:
            self._pump()
            time.sleep(0.02)
        self._pump()
        if self._process.poll() is None:
            log.warning("W&B did not finish in %.0f s; what it has is in the wandb folder of the run", timeout)
        if self.num_dropped:
            log.warning("W&B lacks %d lines that it was too slow for; metrics.jsonl has them all", self.num_dropped)
        self._close()

    def _start(self, wishes: dict[str, Any]) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        environ = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's telemetry of itself, which waits at the exit
        environ[_CONFIG] = json.dumps(wishes, default=str)
        inbox, self._to = os.pipe()
        self._from, outbox = os.pipe()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)
        try:
            self._scratch = environ["TMPDIR"] = tempfile.mkdtemp(prefix="vitdist-wandb-")
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vitdist.tracking", str(inbox), str(outbox)],
                env=environ,
                pass_fds=(inbox, outbox),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C in the terminal is for the training
            )
        except OSError as error:
            log.warning("W&B could not be started (%s); training goes on without it", redact(str(error)))
        finally:
            os.close(inbox)
            os.close(outbox)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process is None:
            return
        line = json.dumps(message, default=str).encode() + b"\n"
        if len(self._pending) + len(line) > MAX_PENDING:
            self.num_dropped += 1
        else:
            self._pending += line
        self._pump()

    def _pump(self) -> None:
        """Move bytes both ways as far as that goes without waiting."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            while self._pending:
                del self._pending[: os.write(self._to, self._pending[: 1 << 16])]
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._from, 1 << 16):
                self._news += data
        while b"\n" in self._news:
            line, _, rest = self._news.partition(b"\n")
            self._news = rest
            self._hear(json.loads(line))

    def _hear(self, news: dict[str, str]) -> None:
        self.state = news["state"]
        expected = self.state == "running" or self.state == self.mode
        log.log(logging.INFO if expected else logging.WARNING, "%s", news["line"])

    def _close(self) -> None:
        assert self._process is not None
        end_process_tree(self._process.pid)
        self._process.wait()
        shutil.rmtree(self._scratch, ignore_errors=True)
        os.close(self._to)
        os.close(self._from)
        self._process = None


def _strictest(mode: str) -> str:
    asked = os.environ.get("WANDB_MODE", "online")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        asked = "disabled"
    return min(mode, asked if asked in MODES else "online", key=MODES.index)


def end_process_tree(pid: int, *, itself: bool = True) -> None:
    """Kill a process and all it started; W&B's own service leads a session of its own, so a group would miss it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents.setdefault(int((entry / "stat").read_text().rpartition(")")[2].split()[1]), []).append(
                int(entry.name)
            )
    doomed = [pid]
    for process in doomed:  # grows while it is walked
        doomed += parents.get(process, [])
    for process in doomed if itself else doomed[1:]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)


class _Service:
    """The W&B process: reads lines from the training until it finishes or is gone."""

    def __init__(self, inbox: int, outbox: int) -> None:
        self.inbox, self.outbox = inbox, outbox
        self.poll = select.poll()  # select() knows no descriptor above 1023, and a trainer may have that many
        self.poll.register(inbox, select.POLLIN)
        self.parent = os.getppid()
        self.wishes: dict[str, Any] = json.loads(os.environ[_CONFIG])
        self.buffer = b""

    def say(self, state: str, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self.outbox, json.dumps({"state": state, "line": redact(line)}).encode() + b"\n")

    def run(self) -> None:
        try:
            run = self.start()
        except Exception as error:  # whatever W&B raises: the training hears of it and goes on
            reason = redact(f"{type(error).__name__}: {error}")
            if self.wishes["mode"] == "online" and not isinstance(error, ImportError):
                self.start_again_offline(reason)
            self.say("failed", f"W&B is off ({reason}); training goes on, metrics.jsonl is complete")
            return
        if self.wishes["mode"] == "online":
            self.say("running", f"W&B: {run.url}")
        else:
            why = f"failed to go online ({self.wishes['reason']}) and is" if "reason" in self.wishes else "is"
            folder = Path(run.dir).parent
            self.say("offline", f"W&B {why} recorded offline; upload it later with: wandb sync '{folder}'")
        self.serve(run)

    def start(self) -> Any:
        """A W&B run within the time allowed; an alarm ends waits that W&B's own limits do not cover."""
        signal.signal(signal.SIGALRM, _too_late)
        signal.setitimer(signal.ITIMER_REAL, self.wishes["init_seconds"])
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,  # a remote's address may hold a token
            save_code=False,
            init_timeout=self.wishes["init_seconds"],
            stop_fn=lambda: None,  # stopping is the recipe's, signals' and the stop file's matter
            x_stats_pid=self.parent,
        )
        wishes = {key: self.wishes[key] for key in ("mode", "project", "name", "id", "dir", "config")}
        run = wandb.init(**wishes, resume="allow", settings=settings)
        signal.setitimer(signal.ITIMER_REAL, 0)
        run.define_metric("step")
        run.define_metric("*", step_metric="step")  # an own axis: W&B's drops steps that a resumed run repeats
        return run

    def start_again_offline(self, reason: str) -> None:
        """A fresh process image, since a W&B that failed half-way cannot be trusted to start again."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        end_process_tree(os.getpid(), itself=False)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, 0):
                pass
        os.environ[_CONFIG] = json.dumps({**self.wishes, "mode": "offline", "reason": reason})
        os.environ.pop("WANDB_SERVICE", None)
        os.execv(sys.executable, [sys.executable, "-m", "vitdist.tracking", str(self.inbox), str(self.outbox)])

    def serve(self, run: Any) -> None:
        from wandb import teardown

        message: dict[str, Any] = {}
        while "finish" not in message:
            message = self.next_message()
            if "log" in message:
                run.log(message["log"])
            run.summary.update(message.get("summary", {}))
        signal.setitimer(signal.ITIMER_REAL, message["seconds"])
        run.finish(exit_code=message["finish"])
        teardown()

    def next_message(self) -> dict[str, Any]:
        """The next line, or a finish of our own when the training is gone."""
        while b"\n" not in self.buffer:
            ready = self.poll.poll(1000)
            data = os.read(self.inbox, 1 << 16) if ready else b""
            if not data and (ready or os.getppid() != self.parent):
                return {"finish": 1, "seconds": 10.0}
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return dict(json.loads(line))


def _too_late(*_: object) -> None:
    raise TimeoutError("no answer in time")


def main() -> None:
    """The W&B process. Signals to the job's processes are the training's to answer."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    os.nice(5)  # the training comes first
    try:
        _Service(int(sys.argv[1]), int(sys.argv[2])).run()
    finally:
        end_process_tree(os.getpid(), itself=False)
        shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
        os._exit(0)  # W&B's own exit hooks would wait for the network once more


if __name__ == "__main__":
    main()
