"""A deployment on this machine: a SuperLink, two SuperNodes, ``flwr run``; bytes and losses.

    python examples/flower_llama/run.py                       # 4 bits both ways
    python examples/flower_llama/run.py --codec ""            # as Flower sends it, for comparison
    python examples/flower_llama/run.py --codec subspace:auto --rounds 6        # in code space

Nodes reach the SuperLink through a proxy that counts TCP bytes. Everything is stopped at the end.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
LIMIT = 300
BIN = Path(sys.executable).parent


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Proxy:
    """Passes connections on to a port and counts bytes in both directions."""

    def __init__(self, target: int) -> None:
        self.up = self.down = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            node, _ = self._listener.accept()
            try:
                link = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the SuperLink has ended, nodes have not noticed yet
                node.close()
                continue
            for source, to, way in ((node, link, "up"), (link, node, "down")):
                threading.Thread(target=self._pump, args=(source, to, way), daemon=True).start()

    def _pump(self, source: socket.socket, to: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def listening(port: int) -> bool:
    """Whether somebody accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


class Deployment:
    """A SuperLink and SuperNodes on this machine, which reach it through a ``Proxy``.

        with Deployment(folder) as here:
            here.start_link()
            here.start_node(0)
            here.submit(app, {"rounds": 3})

    Args:
        folder: for logs (``link.log``, ``node0.log``) and Flower's own files; made if need be.
        paths: where ``ServerApp`` and ``ClientApp`` find modules, beside this process's own.
    """

    def __init__(self, folder: Path, *paths: Path) -> None:
        self.folder, self.api = folder, free_port()
        self.proxy = Proxy(self.api)
        self.processes: dict[str, subprocess.Popen] = {}
        self._environment = dict(
            os.environ,
            FLWR_HOME=str(folder / "flwr"),
            FLWR_TELEMETRY_ENABLED="0",
            FLWR_DISABLE_UPDATE_CHECK="1",
            FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
            OMP_NUM_THREADS="1",
            PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
            PYTHONPATH=os.pathsep.join([*map(str, paths), *filter(None, sys.path)]),
        )
        (folder / "flwr").mkdir(parents=True)
        (folder / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.api}"\n'
            "insecure = true\n"
        )

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()

    def start_link(self, *options: str) -> None:
        """Start the SuperLink, and wait until it listens."""
        address = ("--host", "127.0.0.1", "--port", str(self.api))
        self._start("link", "flower-superlink", "--insecure", *address, *options)
        self.wait_for(lambda: listening(self.api), "the SuperLink's start", 60)

    def start_node(self, number: int) -> None:
        """Start the SuperNode of one part of the data."""
        self._start(
            f"node{number}",
            "flower-supernode",
            *("--insecure", "--superlink", f"127.0.0.1:{self.proxy.port}"),
            *("--port", str(free_port())),
            *("--node-config", f"partition-id={number} num-partitions=2"),
        )

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log
            )

    def kill(self, name: str) -> None:
        """End a process as a crash would, without a word to anybody."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def flwr(self, *command: str) -> str:
        """What the command line tool says.

        Raises:
            SystemExit: it fails.
        """
        done = subprocess.run(
            ["flwr", *command], env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        return done.stdout

    def submit(self, app: Path, settings: dict) -> str:
        """Start a run of an app, and do not wait for its end; what Flower says."""
        text = " ".join(f"{k}={json.dumps(v)}" for k, v in settings.items())
        return self.flwr("run", str(app), "here", "--run-config", text)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        """Poll a function until it is true.

        Raises:
            SystemExit: it takes too long, or a process has ended.
        """
        end = time.monotonic() + seconds
        while not condition():
            dead = [name for name, p in self.processes.items() if p.poll() is not None]
            if dead or time.monotonic() > end:
                raise SystemExit(f"{what} did not happen; ended: {dead or 'nothing'}")
            time.sleep(0.2)


def run(settings: dict, folder: Path, app: Path = HERE) -> dict:
    """One federation of a Flower app with this run config; its report, TCP bytes and seconds."""
    report = folder / "report.json"
    with Deployment(folder, app.resolve()) as here:
        here.start_link()
        for node in range(2):
            here.start_node(node)
        time.sleep(4)
        began = time.monotonic()
        here.submit(app, {**settings, "report": str(report)})
        here.wait_for(report.exists, "the end of the run", LIMIT)
        seconds = time.monotonic() - began
        time.sleep(1)
    found = json.loads(report.read_text())
    return {**found, "up": here.proxy.up, "down": here.proxy.down, "seconds": round(seconds, 1)}


def main() -> None:
    """Run once, print a line each for losses and bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--codec", default="int4", help="of replies; empty: fp32, without gradcodec"
    )
    parser.add_argument("--downlink", default="int4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(vars(options), Path(folder))
    print("codec     ", options.codec or "none", "up,", options.downlink, "down")
    print("held-out  ", " ".join(f"{loss:.4f}" for loss in found["losses"]))
    print(f"TCP bytes  {found['up']:,} up, {found['down']:,} down, {found['seconds']} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
