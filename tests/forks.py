"""Processes that start at once: forked from a server that has imported torch and all of convsim beforehand.

A new interpreter spends five to eight seconds of a core on these imports. What comes after them, the end of the
interpreter included, is the same in a fork.
"""

from __future__ import annotations

import atexit
import os
import pkgutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from threading import Timer
from typing import Any, TextIO, TypeVar

import convsim_cli.cli

Result = TypeVar("Result")
Stream = int | str | None  # a file descriptor, subprocess.PIPE, a file's path, "closed", or None for the tests' own

ROOT = str(Path(__file__).parents[1])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))  # test this tree alone

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *(module.name for module in pkgutil.walk_packages(convsim_cli.__path__, "convsim_cli.")),
        *("pytest", "hypothesis", "sklearn.datasets", "torch._dynamo", "torchvision.datasets"),
    ]
)


def fork(function: Callable[..., object], *arguments: object) -> ForkServerProcess:
    """Call a module's function in a process of its own."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def call_in_fork(function: Callable[..., Result], *arguments: object) -> Result:
    """Return what a module's function returns in a process of its own; show the traceback of what it raises there."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = fork(_deliver, sender, function, arguments)
    sender.close()
    try:
        succeeded, result = receiver.recv()
    except EOFError:
        succeeded, result = False, f"{function.__name__} ended without a result"
    process.join()
    assert succeeded, result
    return result


def _deliver(sender: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    try:
        sender.send((True, function(*arguments)))
    except Exception:  # whatever it is, the test that called fails with it
        sender.send((False, traceback.format_exc()))


def run_code(code: str, *arguments: object, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Run `python -c CODE ARGUMENTS` to its end; return its exit code and what it wrote to stdout and stderr."""
    program = Program(*arguments, stdout=subprocess.PIPE, environment=environment, code=code)
    out, err = program.communicate()
    program.close()
    return program.wait(), out, err


class Descriptor(int):
    """A file descriptor that keeps its meaning on the way into a fork."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (DupFd(int(self)),)


def _received(duplicate: Any) -> int:
    return int(duplicate.detach())


class Program:
    """`python -m convsim_cli ARGUMENTS` in a fork, with the methods of `subprocess.Popen` that the tests need.

    code: run this instead, as `python -c CODE ARGUMENTS` does: it imports convsim anew, and may change tables first.
    """

    def __init__(
        self,
        *arguments: object,
        stdout: Stream = None,
        stderr: Stream = subprocess.PIPE,
        environment: Mapping[str, str] | None = None,
        code: str | None = None,
    ) -> None:
        self.stdout, out = _ends(stdout, 1)
        self.stderr, err = _ends(stderr, 2)
        settings = {**os.environ, **(environment or {})}
        self._process = fork(_run_program, [*map(str, arguments)], settings, str(Path.cwd()), out, err, code)
        for stream, end in ((stdout, out), (stderr, err)):
            if end is not None and end not in (1, 2, stream):
                os.close(end)  # the fork has its own

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("convsim", timeout or 0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self.poll() is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end and return what is left of stdout and stderr; after `timeout` seconds, kill it."""
        killer = Timer(timeout, self.kill)
        killer.start()
        out, err = (stream.read() if stream and not stream.closed else "" for stream in (self.stdout, self.stderr))
        self.wait()
        killer.cancel()
        return out, err

    def close(self) -> None:
        self.kill()
        self.wait()
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()


def _ends(stream: Stream, own: int) -> tuple[TextIO | None, Descriptor | None]:
    """Return the end that the tests read, and the one that the program writes."""
    if stream == subprocess.PIPE:
        reader, writer = os.pipe()
        return open(reader), Descriptor(writer)
    if stream == "closed":
        return None, None
    if isinstance(stream, str):
        return None, Descriptor(os.open(stream, os.O_WRONLY))
    return None, Descriptor(own if stream is None else stream)


def _run_program(
    arguments: list[str],
    environment: Mapping[str, str],
    folder: str,
    out: int | None,
    err: int | None,
    program: str | None,
) -> None:
    """What a new interpreter does with its streams, then the program, then the interpreter's end."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
    sys.stdout, sys.stderr = _opened(out, 1), _opened(err, 2)
    sys.argv = ["convsim", *arguments]
    code = 0
    try:
        if program is None:
            convsim_cli.cli.main()
        else:
            for name in [name for name in sys.modules if name.partition(".")[0] == "convsim_cli"]:
                del sys.modules[name]
            exec(program, {"__name__": "__main__"})
    except SystemExit as end:
        code = int(end.code or 0)
    except Exception:  # as an interpreter shows it
        traceback.print_exc()
        code = 1
    _end(code)


def _opened(source: int | None, target: int) -> Any:
    if source is None:
        os.close(target)
        return None
    os.dup2(source, target)
    os.close(source)
    errors = "backslashreplace" if target == 2 else "strict"
    encoding = os.environ.get("PYTHONIOENCODING")
    return open(target, "w", 1 if target == 2 else -1, encoding, errors, closefd=False)


def _end(code: int) -> None:
    """What an interpreter does at its end, without taking its modules apart, which takes seconds."""
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError as error:
            code = 120
            with suppress(OSError):
                print(f"Exception ignored in: {stream!r}: {error}", file=sys.stderr, flush=True)
    os._exit(code)
