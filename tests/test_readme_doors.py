"""The README's three doors do what they say, with a reader's own loop where they have dots."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from federated.toy import subspace
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradcodec as gc
from gradcodec.types import UpdateSpec

README = Path(__file__).parents[1] / "README.md"
DDP, FLOWER, CODE = re.findall(r"^```py\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def split(door: str) -> tuple[str, str]:
    """What comes before the dots and after them."""
    before, after = re.split(r"^\.\.\..*\n", door, flags=re.MULTILINE)
    return before, after


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_data_parallel(alone: None, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {
        "model": nn.Linear(64, 64),
        "DistributedDataParallel": DistributedDataParallel,
    }
    before, after = split(DDP)
    exec(before, names)
    names["model"](torch.randn(8, 64)).square().mean().backward()
    exec(after, names)
    assert int(capsys.readouterr().out) == 0  # alone in the world: nothing crosses a wire
    assert names["compression"].stats()["steps"] == 1
    assert names["compression"].stats()["codecs"]["weight"] == "int4"


def test_flower() -> None:
    pytest.importorskip("flwr")
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg
    from integrations.flower_loopback import LoopbackGrid

    before, after = split(FLOWER)
    names: dict[str, Any] = {"ClientApp": ClientApp}
    exec(before, names)
    app = names["app"]

    @app.train()
    def train(message: Message, context: object) -> Message:
        state = message.content["arrays"].to_torch_state_dict()
        arrays = ArrayRecord({n: t + 1 for n, t in state.items()})
        content = {"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: object) -> Message:
        metrics = MetricRecord({"num-examples": 1, "loss": 0.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    grid = LoopbackGrid(lambda: app, 2)
    more = {"grid": grid, "FedAvg": FedAvg, "ArrayRecord": ArrayRecord}
    names |= {**more, "model": nn.Linear(256, 64)}
    exec(after.replace("FedAvg().start", "result = FedAvg().start"), names)
    moved = names["result"].arrays.to_torch_state_dict()
    for name, t in names["model"].state_dict().items():
        torch.testing.assert_close(moved[name], t + 3, atol=0.1, rtol=0)  # three rounds
    fp32 = sum(t.nbytes for t in names["model"].state_dict().values())
    assert max(message["up"] for message in grid.log) < fp32 / 3


def test_code_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from federated.toy import Toy

    monkeypatch.chdir(tmp_path)
    subspace().save_pretrained("my-codec")
    task = Toy()
    step = "optimizer.zero_grad(); loss(batch).backward(); optimizer.step()"
    names: dict[str, Any] = {
        **{"gc": gc, "torch": torch, "model": task.parameters, "loss": task.loss},
        "data": torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)),
    }
    exec(re.sub(r"\.\.\. .*", step, CODE), names)
    payload = names["payload"]
    decoded = names["codec"].bind(UpdateSpec.of(task.initial)).decoder.decode(payload)
    start = Toy().initial
    for name, p in task.parameters.items():
        torch.testing.assert_close(start[name] + decoded[name], p.detach())
        assert not torch.equal(start[name], p.detach())
