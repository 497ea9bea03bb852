"""A real web server on loopback, and a wire in front of it that can be cut: for tests of what is fetched from afar."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
WHY_NOT = "nginx is not installed (apt-get install nginx-light)"
_CONFIG = """
daemon off; pid {work}/nginx.pid; error_log {work}/error.log; worker_processes 1; {user}
events {{ worker_connections 256; }}
http {{
  log_format sent '$status $body_bytes_sent $request_method $uri';
  access_log {work}/access.log sent;
  client_body_temp_path {work}/body; proxy_temp_path {work}/proxy; fastcgi_temp_path {work}/fast;
  uwsgi_temp_path {work}/uwsgi; scgi_temp_path {work}/scgi;
  server {{
    listen 127.0.0.1:{port}; root {root};
    {rules}
  }}
}}
"""
BY_NODE = "rewrite ^/node[0-9]+/(.*)$ /$1 last;"  # so that the log tells whose bytes they were


@dataclass(frozen=True)
class Sent:
    """One line of the access log."""

    status: int
    bytes: int
    path: str


class Nginx:
    """nginx serving a folder; `rules` are lines of its server block, replaced by `reload`."""

    def __init__(self, root: Path, work: Path, rules: str = "") -> None:
        assert NGINX is not None
        work.mkdir()
        self.root, self.work, self.port, self._num_marks = root, work, free_port(), 0
        self._write(rules)
        self._process = subprocess.Popen(
            [NGINX, "-p", str(work), "-c", str(work / "nginx.conf")], stderr=subprocess.DEVNULL
        )
        wait_until(lambda: can_connect(self.port))

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def reload(self, rules: str = "") -> None:
        """Change the rules; returns once the new worker serves."""
        self._write(rules)
        notices = (self.work / "error.log").read_text().count("exited with code 0")
        self._process.send_signal(signal.SIGHUP)
        wait_until(lambda: (self.work / "error.log").read_text().count("exited with code 0") > notices)

    def log(self) -> list[Sent]:
        """What was sent so far; bodies that were cut count as far as they went."""
        self._num_marks += 1
        mark = f"/mark-{self._num_marks}"  # nginx writes a line after its answer: this one comes after all before it
        with contextlib.suppress(OSError):
            urllib.request.urlopen(self.address + mark).close()
        wait_until(lambda: f"{mark}\n" in (self.work / "access.log").read_text())
        lines = (self.work / "access.log").read_text().splitlines()
        found = [re.fullmatch(r"(\d+) (\d+) \w+ (.*)", line) for line in lines if "/mark-" not in line]
        return [Sent(int(match[1]), int(match[2]), match[3]) for match in found if match]

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def _write(self, rules: str) -> None:
        user = "user root;" if os.geteuid() == 0 else ""
        text = _CONFIG.format(work=self.work, port=self.port, root=self.root, rules=rules, user=user)
        (self.work / "nginx.conf").write_text(text.replace("error.log;", "error.log notice;"))


class Wire:
    """A port that passes bytes on to another and does what `fault` says to each new connection's answer.

    `fault(number)` gives (bytes to pass before the connection is cut, or None; seconds to wait before each piece).
    """

    def __init__(self, target: int, fault: Callable[[int], tuple[int | None, float]]) -> None:
        self.target, self.fault, self.num_connections = target, fault, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self._server.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            number, self.num_connections = self.num_connections, self.num_connections + 1
            left, pause = self.fault(number)  # before anything of this connection reaches the server
            upstream = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=_pass, args=(client, upstream, None, 0.0), daemon=True).start()
            threading.Thread(target=_pass, args=(upstream, client, left, pause), daemon=True).start()


def _pass(source: socket.socket, sink: socket.socket, left: int | None, pause: float) -> None:
    try:
        while (left is None or left > 0) and (data := source.recv(min(left or 65536, 4096 if pause else 65536))):
            time.sleep(pause)
            sink.sendall(data)
            left = left if left is None else left - len(data)
    except OSError:
        pass  # the other side was cut
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def can_connect(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
