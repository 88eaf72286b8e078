"""Fast starts of `train.py`: one template process imports everything once, and every run is a fork of it.

A normal start imports for seconds. A fork has no imports left to do. Otherwise it is a process like any other: it has
its own session, signal handlers and files, and it can be killed.
"""

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SERVER = """
import gc, importlib, json, os, signal, sys
import train, training.loop  # `train.main` imports the loop late
from model.errors import cli

def run(argv, streams, environment, absent):
    os.setsid()
    os.environ.update(environment)
    sys.modules.update(dict.fromkeys(absent))  # `import` fails
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = argv
    code = 1
    try:
        code = cli(importlib.import_module(argv[0].removesuffix(".py")).main)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)

gc.collect()
gc.freeze()  # so that a fork's garbage collector skips all objects of the template
signal.signal(signal.SIGINT, signal.SIG_IGN)
for line in sys.stdin:
    request = json.loads(line)
    if "argv" in request:
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            run(request["argv"], request["streams"], request["environment"], request["absent"])
        print(json.dumps(pid), flush=True)
    else:
        pid, status = os.waitpid(request["pid"], request["options"])
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
"""


class Forked:
    """A run, with those methods of `subprocess.Popen` that tests use. It leads its own process group.

    `argv` begins with train.py or a module that has a `main`. `environment` is added to ours. Packages in `absent`
    can't be imported. `preload` is a shared library for the template and all its forks.
    """

    def __init__(
        self,
        argv: list[str],
        log: Path | None = None,
        environment: dict[str, str] | None = None,
        absent: tuple[str, ...] = (),
        preload: str = "",
    ):
        self.preload = preload
        self.streams = [log or Path(_new_file(suffix)) for suffix in ("-out", "-errors")]
        self.returncode: int | None = None
        request = {"argv": argv, "streams": [str(s) for s in self.streams]}
        self.pid: int = self._ask(request | {"environment": environment or {}, "absent": absent})

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._ask({"pid": self.pid, "options": os.WNOHANG})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired("train.py", timeout, *(s.read_text() for s in self.streams))
            time.sleep(0.01)
        out, errors = (s.read_text() for s in self.streams)
        return out, errors

    def _ask(self, request: object) -> int:
        server = _server(self.preload)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())


@cache
def _server_folder() -> str:
    folder = tempfile.mkdtemp(prefix="runs-")
    atexit.register(shutil.rmtree, folder)
    return folder


def _new_file(suffix: str) -> Path:
    descriptor, path = tempfile.mkstemp(suffix, dir=_server_folder())
    os.close(descriptor)
    return Path(path)


@cache
def _server(preload: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"LD_PRELOAD": preload} if preload else {})
    command = [sys.executable, "-c", SERVER]
    server = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    atexit.register(server.kill)
    return server
