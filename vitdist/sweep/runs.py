"""One run after another, each a real training of its own: what is done is passed over, what was stopped goes on."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vitdist.errors import Stopped, UsageError, VitdistError
from vitdist.recipe.changes import frozen_differences
from vitdist.recipe.load import load_recipe
from vitdist.runtime.failures import EXIT_FILE
from vitdist.sweep.grid import Setting

FORWARDED = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Run:
    """A setting with its folder, and the command that trains it or goes on with it."""

    setting: Setting
    folder: Path
    command: tuple[str, ...]

    def exit_code(self) -> int | None:
        """What the folder says of its last start; None while it says nothing."""
        try:
            code = json.loads((self.folder / EXIT_FILE).read_text(encoding="utf-8"))["code"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return code if isinstance(code, int) else None


def prepare(recipe: Path, settings: Sequence[Setting], folder: Path, launcher: str | None) -> list[Run]:
    """Every run, checked before the first begins: RecipeError for wrong values, UsageError for a folder of others."""
    prefix = _launcher(launcher)
    runs = []
    for setting in settings:
        out = folder / setting.label
        overrides = (*setting.overrides, f"name={setting.label}", f"out={out}")
        runs.append(Run(setting, out, (*prefix, "-m", "vitdist", "train", str(recipe), *overrides)))
        _check(recipe, overrides, runs[-1])
    return runs


def _launcher(text: str | None) -> list[str]:
    """The words before `-m vitdist train`: this Python, or a launcher that takes -m as Python does."""
    if text is None:
        return [sys.executable]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f"--launcher {text!r} cannot be read: {error}") from None
    beside = Path(sys.executable).parent / words[0] if words else None
    if not words or (shutil.which(words[0]) is None and not (beside is not None and beside.is_file())):
        raise UsageError(f'--launcher {text!r} names no program; write one like "torchrun --nproc-per-node 2"')
    return words if shutil.which(words[0]) is not None else [str(beside), *words[1:]]


def _check(recipe: Path, overrides: Sequence[str], run: Run) -> None:
    """The recipe's mistakes now; and a folder is gone on with only if it holds this very run."""
    wanted = load_recipe(recipe, overrides)
    written = run.folder / "recipe.yaml"
    if not written.exists():
        return
    try:
        changed = frozen_differences(load_recipe(written), wanted)
    except VitdistError as error:
        raise UsageError(f"{written} cannot be compared ({error}); give the sweep another --out DIR") from None
    if changed:
        raise UsageError(
            f"{run.folder} holds a run with another {', '.join(changed)}; give the sweep another --out DIR"
        )


class Runner:
    """Runs them; a signal to stop is handed to the run that is going on, which saves, and ends the sweep."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def all(self, runs: Sequence[Run]) -> int:
        """0 when every run is done, else the first failure's code; 75 when stopped. Failures do not end a sweep."""
        before = {number: signal.signal(number, self._on_signal) for number in FORWARDED}
        try:
            codes = [self._one(number, len(runs), run) for number, run in enumerate(runs, 1)]
        except Stopped as stopped:
            print(f"vitdist: {stopped}", file=sys.stderr)
            return Stopped.exit_code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return next((code for code in codes if code), 0)

    def _one(self, number: int, total: int, run: Run) -> int:
        name = f"[{number}/{total}] {run.setting.label}"
        if run.exit_code() == 0:
            print(f"{name}: done before", flush=True)
            return 0
        again = (run.folder / "recipe.yaml").exists()
        print(f"{name}: {'goes on' if again else 'starts'} in {run.folder}", flush=True)
        code = self._start(run)
        if code == Stopped.exit_code or self._stopping:
            raise Stopped(f"stopped during {run.setting.label}; the same command goes on there")
        if code:
            print(f"{name}: ended with {code}", flush=True)
        return code

    def _start(self, run: Run) -> int:
        """The run's own exit code, from its folder: launchers turn every one into 1."""
        (run.folder / EXIT_FILE).unlink(missing_ok=True)
        if self._stopping:
            return Stopped.exit_code
        # a session of its own: Ctrl-C reaches it once, from here, and not a second time from the terminal
        self._process = subprocess.Popen(run.command, start_new_session=True)
        code = self._process.wait()
        self._process = None
        said = run.exit_code()
        return said if said is not None else code

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
