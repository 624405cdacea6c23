"""Your own transport: a server and three clients, as processes, over HTTP by the standard library.

    python examples/plain_loop.py

Client 2 leaves after two rounds and comes back as a new process, from what it kept in a file.
"""

import argparse
import http.server
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from torch import nn

import gradcodec as gc
from gradcodec.errors import GradcodecError
from gradcodec.federated import Client, Server

ROUNDS, PATIENCE = 8, 30.0
CODEC = gc.make_codec("int4")


def build() -> nn.Module:
    """The same initial model everywhere; nobody sends it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of one client, or, with another seed, held-out ones."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :8].argmax(1)


# -- the server: it answers GET with what a client lacks, and takes replies by POST ----------------


class Hub:
    """The federation's server, and a lock, since requests come in threads."""

    def __init__(self) -> None:
        self.server, self.lock = Server(build(), CODEC), threading.Lock()
        self.up = self.down = 0
        self.expected = 3
        self.since = time.monotonic()

    def broadcast(self, version: int) -> bytes:
        """What brings a client from this round to now."""
        with self.lock:
            blob = self.server.broadcast(version)
            self.down += len(blob)
            return blob

    def receive(self, blob: bytes) -> None:
        """Take a reply."""
        with self.lock:
            self.up += len(blob)
            self.server.receive(blob)

    def close_when_ready(self) -> bool:
        """Close the round once all have replied, or some have and the others take too long."""
        with self.lock:
            here = len(self.server.replies)
            late = time.monotonic() - self.since > PATIENCE
            if here < self.expected and not (here and late):
                return False
            who = self.server.replies
            self.server.close_round()
            self.since = time.monotonic()
        print(f"round {self.server.round}  clients {list(who)}  held-out loss {self.loss():.4f}")
        return True

    @torch.no_grad()
    def loss(self) -> float:
        """Of the global state, on points that nobody trains on."""
        model, (x, y) = build(), data(99)
        model.load_state_dict(self.server.replica.state())
        return nn.functional.cross_entropy(model(x), y).item()


def serve(hub: Hub) -> http.server.ThreadingHTTPServer:
    """Answer on a free port of this machine."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(200, hub.broadcast(int(self.path.strip("/"))))

        def do_POST(self) -> None:
            try:
                hub.receive(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(200, b"")
            except GradcodecError as err:  # late, damaged, twice: the reply is lost, nothing else
                self._answer(409, str(err).encode())

        def _answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    return made


# -- a client: it asks for what it lacks, trains, replies, and keeps its state in a file -----------


def take_part(number: int, url: str, kept: Path, rounds: int) -> None:
    """Train in so many rounds, then leave."""
    model = build()
    client = Client(number, model, CODEC)
    if kept.exists():
        client.receive(kept.read_bytes())
    x, y = data(number)
    replied = -1
    while rounds:
        with urllib.request.urlopen(f"{url}/{client.version}", timeout=30) as answer:
            state = client.receive(answer.read())
        if client.version == replied:  # the round is still open
            time.sleep(0.05)
            continue
        model.load_state_dict(state)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        blob = client.reply(model, examples=len(x))
        try:
            urllib.request.urlopen(url, data=blob, timeout=30).close()
        except urllib.error.HTTPError as err:
            print(f"client {number}: {err.read().decode()}", file=sys.stderr)
        replied, rounds = client.version, rounds - 1
        kept.write_bytes(client.snapshot())


def main() -> None:
    """Start everything, and stop it after the last round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", nargs=4, metavar=("NUMBER", "URL", "FILE", "ROUNDS"))
    who = parser.parse_args().client
    torch.set_num_threads(1)
    if who:
        take_part(int(who[0]), who[1], Path(who[2]), int(who[3]))
        return
    hub = Hub()
    url = f"http://127.0.0.1:{serve(hub).server_address[1]}"
    with tempfile.TemporaryDirectory() as folder:

        def start(number: int, rounds: int) -> subprocess.Popen[bytes]:
            file = str(Path(folder, f"client-{number}"))
            command = [sys.executable, __file__, "--client", str(number), url, file, str(rounds)]
            return subprocess.Popen(command)

        print(f"round 0  held-out loss {hub.loss():.4f}")
        running = [start(0, ROUNDS), start(1, ROUNDS), start(2, 2)]
        try:
            while hub.server.round < ROUNDS:
                if not hub.close_when_ready():
                    time.sleep(0.02)
                elif hub.server.round == 2:
                    hub.expected = 2  # client 2 leaves
                elif hub.server.round == 4:
                    running.append(start(2, ROUNDS))  # it is back
                    hub.expected = 3
        finally:
            for process in running:
                process.terminate()
                process.wait()
    dense = sum(4 * p.numel() for p in build().parameters())
    print(f"a model in fp32 takes {dense:,} bytes; sent {hub.up:,} up, {hub.down:,} down")


if __name__ == "__main__":
    main()
