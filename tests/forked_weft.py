"""Runs `weft` commands in forked processes, which spares each the seconds of importing.

A server has imported what weft needs. Whoever wants a command run connects to its socket and sends
the arguments, folder and environment, with its standard input, output and error; a fork of the
server has them for its own, runs the command as the installed script does, and answers with its
process id and then its exit code, one a line. :data:`CLIENT` is a script that asks for that and is,
to a shell, the command.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import socket
import sys
import threading
import traceback
from pathlib import Path

# what weft imports late is imported before the forks
import alembic.command
import alembic.script  # noqa: F401
import opacus.accountants
import opacus.grad_sample  # noqa: F401
import peft  # noqa: F401

from orchestrator import (
    cli,
    service,  # noqa: F401
)

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(asked)
    answers = server.makefile()
    command = int(answers.readline())
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: os.kill(command, number))
    sys.exit(int(answers.readline() or 137))
"""


def perform(connection: socket.socket) -> None:
    """Run the command that a connection asks for, as this process; never return."""
    header, handles, _, _ = socket.recv_fds(connection, 8, 3)
    arguments, folder, environment = json.loads(
        connection.makefile("rb").read(int.from_bytes(header, "big"))
    )
    for number, handle in enumerate(handles):
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["weft", *arguments]
    connection.sendall(f"{os.getpid()}\n".encode())
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(f"{code}\n".encode())
    os._exit(0)


def main() -> None:
    """Put a ``weft`` into the folder ``sys.argv[1]`` and serve it until standard input ends."""
    address, command = Path(sys.argv[1]) / "socket", Path(sys.argv[1]) / "weft"
    command.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    command.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(address))
        server.listen()
        print("ready", flush=True)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                perform(connection)
            connection.close()
            reap()


def reap() -> None:
    """Forget the commands that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    main()
