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


def wait_for(condition: object, what: str, seconds: float, processes: list) -> None:
    """Poll a function until it is true; complain if it takes too long or a process has ended."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        dead = [p.args[0] for p in processes if p.poll() is not None]
        if dead or time.monotonic() > end:
            raise SystemExit(f"{what} did not happen; ended: {dead or 'nothing'}")
        time.sleep(0.2)


def listening(port: int) -> bool:
    """Whether somebody accepts connections."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def run(settings: dict, folder: Path, app: Path = HERE) -> dict:
    """One federation of a Flower app with this run config; its report, TCP bytes and seconds."""
    api, report = free_port(), folder / "report.json"
    environment = dict(
        os.environ,
        FLWR_HOME=str(folder / "flwr"),
        FLWR_TELEMETRY_ENABLED="0",
        FLWR_DISABLE_UPDATE_CHECK="1",
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        OMP_NUM_THREADS="1",
        PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}",
        PYTHONPATH=os.pathsep.join([str(app.resolve()), *filter(None, sys.path)]),
    )
    (folder / "flwr").mkdir(parents=True)
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{api}"\n'
        "insecure = true\n"
    )
    processes: list[subprocess.Popen] = []

    def start(name: str, *command: str) -> None:
        log = (folder / f"{name}.log").open("wb")
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    try:
        start("link", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(api))
        wait_for(lambda: listening(api), "the SuperLink's start", 60, processes)
        proxy = Proxy(api)
        for node in range(2):
            start(
                f"node{node}",
                "flower-supernode",
                *("--insecure", "--superlink", f"127.0.0.1:{proxy.port}"),
                *("--port", str(free_port())),
                *("--node-config", f"partition-id={node} num-partitions=2"),
            )
        time.sleep(4)
        began = time.monotonic()
        values = {**settings, "report": str(report)}
        text = " ".join(f"{k}={json.dumps(v)}" for k, v in values.items())
        flwr = ["flwr", "run", str(app), "here", "--run-config", text]
        done = subprocess.run(flwr, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        wait_for(report.exists, "the end of the run", LIMIT, processes)
        seconds = time.monotonic() - began
        time.sleep(1)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
    found = json.loads(report.read_text())
    return {**found, "up": proxy.up, "down": proxy.down, "seconds": round(seconds, 1)}


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
