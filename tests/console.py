"""Programs that tests start, each in a fork of a process that has the imports and has computed nothing.

A new Python spends seconds on importing torch and lightning, most of what a short run takes. Here one process for all
programs has imported what the tests import. It is forked before the first test: a process in which torch has computed
may have threads (OpenMP's, autograd's where there is a GPU) that its forks miss. Every console script has a test in a
new Python, too.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import runpy
import shutil
import signal
import socket
import socketserver
import sys
import tempfile
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO, NamedTuple

_ADDRESS: list[str] = []


class Finished(NamedTuple):
    """How a program ended; a negative code is a signal."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """A program at work: ``Program(function, *arguments)`` with both picklable.

    Args:
        function: its main program.
        arguments: of the function.
        cwd: its working directory.
        environment: beside this process's own.
    """

    def __init__(self, function: Callable, *arguments: object, cwd: str | Path, **environment: str) -> None:
        meeting = socket.socket(socket.AF_UNIX)
        meeting.connect(_ADDRESS[0])
        self._server = Connection(meeting.detach())
        self._server.send((function, arguments, str(cwd), os.environ | environment))
        self.pid: int = self._server.recv()

    def ended(self) -> bool:
        """Whether it has ended."""
        return self._server.poll()

    def kill(self) -> None:
        """Kill it and the processes that it has started."""
        os.killpg(self.pid, signal.SIGKILL)

    def end(self, timeout: float = 300) -> Finished:
        """Wait for its end; past ``timeout`` seconds it is killed."""
        if not self._server.poll(timeout):
            self.kill()
        with self._server:
            return Finished(*self._server.recv())


def begin(
    name: str, *arguments: object, cwd: str | Path, before: Callable | None = None, **environment: str
) -> Program:
    """Start the console script ``name``; ``before`` (picklable) is called first, to break something in it alone."""
    return Program(_script, name, [str(a) for a in arguments], before, cwd=cwd, **environment)


def shell(
    name: str, *arguments: object, cwd: str | Path, before: Callable | None = None, **environment: str
) -> Finished:
    """Run a console script to its end, as :func:`begin`."""
    return begin(name, *arguments, cwd=cwd, before=before, **environment).end()


def python(
    source: str | Path, *arguments: object, cwd: str | Path, timeout: float = 300, **environment: str
) -> Finished:
    """``python source arguments`` or, where the source is a text, ``python -c source arguments``."""
    return Program(_python, source, [str(a) for a in arguments], cwd=cwd, **environment).end(timeout)


def _script(name: str, arguments: list[str], before: Callable | None) -> None:
    main = next(iter(entry_points(group="console_scripts", name=name))).load()
    sys.argv = [name, *arguments]
    if before is not None:
        before()
    main()


def _python(source: str | Path, arguments: list[str]) -> None:
    sys.argv = ["-c" if isinstance(source, str) else str(source), *arguments]
    if isinstance(source, Path):
        runpy.run_path(str(source), run_name="__main__")
    else:
        exec(compile(source, "<string>", "exec"), {"__name__": "__main__"})


class _Handler(socketserver.BaseRequestHandler):
    """In a fork of the server: starts one program and tells its end."""

    def handle(self) -> None:
        asker = Connection(os.dup(self.request.fileno()))
        function, arguments, cwd, environment = asker.recv()
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            program = os.fork()
            if program == 0:
                os.setpgid(0, 0)
                os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
                os.environ.clear(), os.environ.update(environment)
                os.chdir(cwd)
                _end(function, *arguments)
            with contextlib.suppress(OSError):  # the program may have done it
                os.setpgid(program, program)
            asker.send(program)
            code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
            with contextlib.suppress(BrokenPipeError):  # nobody waits for it
                asker.send((code, _text(out), _text(err)))


def _text(file: BinaryIO) -> str:
    file.seek(0)
    return file.read().decode()


def _end(function: Callable, *arguments: object) -> None:
    """Call the function and leave as Python does."""
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class _Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    block_on_close = False
    max_children = 100

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.parent:  # killed, it cannot stop this process
            os._exit(0)


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Have the process from which programs are forked; to be entered before anything has computed."""
    folder = tempfile.mkdtemp(prefix="hawq-tests-")
    server = _Server(f"{folder}/socket", _Handler)
    server.parent = os.getpid()
    process = os.fork()
    if process == 0:
        _as_a_new_python(server.fileno())
        server.serve_forever()
    server.server_close()
    _ADDRESS.append(server.server_address)
    yield
    _ADDRESS.clear()
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    shutil.rmtree(folder)


def _as_a_new_python(keep: int) -> None:
    """Undo in this process what the test runner did: captured output, handlers, warnings as errors, tracing."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/dev/fd")):
        if number not in (keep, nothing):  # not closed, so that no object of the test runner closes another's file
            with contextlib.suppress(OSError):
                os.dup2(nothing, number, inheritable=number < 3)
    sys.settrace(None), threading.settrace(None)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    sys.modules["__main__"] = types.ModuleType("__main__")  # processes that a program spawns run it first
    logging.getLogger().handlers.clear()
    for reference in logging._handlerList:
        handler = reference() if isinstance(reference, weakref.ref) else reference
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    gc.collect(), gc.freeze()  # a collection in a fork would copy every page
