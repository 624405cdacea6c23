"""Fed-SB: only the cores cross, and their mean is the mean of the products."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.federated.methods import State
from benchmarks.peers.federated import FedSB
from benchmarks.peers.federated.envelope import REPLY_OVERHEAD
from benchmarks.peers.federated.fed_sb import A, B, Frame
from gradcodec.errors import ConfigError

R, OUT, IN = 4, 24, 40
MODULES = ("l0.", "l1.")


def initial() -> State:
    shapes = {A: (R, IN), B: (OUT, R)}
    return {m + end: torch.zeros(shape) for m in MODULES for end, shape in shapes.items()}


def gradient(seed: int) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def fed_sb() -> FedSB:
    frames = {m: Frame.of(gradient(i), R, 1e-2, 2.0) for i, m in enumerate(MODULES)}
    return FedSB(initial(), frames)


def product(state: State, module: str) -> Tensor:
    return state[module + B] @ state[module + A]


def trained(method: FedSB, client: int, state: State) -> tuple[torch.optim.Optimizer, State]:
    """One step of SGD by a made-up gradient of the product."""
    parameters = {n: nn.Parameter(t.clone()) for n, t in state.items()}
    optimizer = method.optimizer(client, parameters, torch.optim.SGD, lr=0.1)
    for i, m in enumerate(MODULES):
        dense = gradient(100 + 10 * client + i)
        (parameters[m + B] @ parameters[m + A] * dense).sum().backward()
    optimizer.step()
    return optimizer, {n: p.detach() for n, p in parameters.items()}


def test_the_first_product_is_the_best_of_its_rank_of_adams_first_step() -> None:
    step = -1e-2 * gradient(0).sign()
    u, s, v = torch.linalg.svd(step, full_matrices=False)
    best = u[:, :R] @ torch.diag(s[:R]) @ v[:R]
    torch.testing.assert_close(2.0 * product(fed_sb().state(), MODULES[0]), best)


def test_a_reply_holds_the_cores_alone() -> None:
    method = fed_sb()
    _, state = method.deliver(0)
    reply = method.reply(0, *trained(method, 0, state), 5)
    assert len(reply) == REPLY_OVERHEAD + 4 * R * R * len(MODULES)
    assert method.codec_bytes == 4 * R * (OUT + IN) * len(MODULES)


def test_training_moves_the_core_and_not_its_frame() -> None:
    method = fed_sb()
    _, state = method.deliver(0)
    _, end = trained(method, 0, state)
    for i, m in enumerate(MODULES):
        frame = method.frames[m]
        assert torch.equal(end[m + B], frame.left)
        # dL/dR = U^T dL/dW V^T
        moved = frame.left.T @ gradient(100 + i) @ frame.right.T
        core = end[m + A] @ frame.right.T
        torch.testing.assert_close(core, frame.core - 0.1 * moved, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(core @ frame.right, end[m + A], rtol=1e-4, atol=1e-6)


def test_the_mean_of_the_cores_is_the_mean_of_the_products() -> None:
    method = fed_sb()
    ends, examples = [], (5, 12)
    for client, count in enumerate(examples):
        _, state = method.deliver(client)
        optimizer, end = trained(method, client, state)
        method.receive(method.reply(client, optimizer, end, count))
        ends.append(end)
    method.close_round()
    for m in MODULES:
        parts = [n / sum(examples) * product(e, m) for n, e in zip(examples, ends, strict=True)]
        torch.testing.assert_close(product(method.state(), m), sum(parts), rtol=1e-4, atol=1e-6)


def test_a_client_has_the_servers_state_to_the_bit() -> None:
    method = fed_sb()
    _, state = method.deliver(0)
    method.receive(method.reply(0, *trained(method, 0, state), 5))
    method.close_round()
    for client in (0, 1):  # one that took part, one that did not
        _, got = method.deliver(client)
        assert all(torch.equal(got[n], t) for n, t in method.state().items())


def test_frames_of_other_modules_are_refused() -> None:
    frames = {"l0.": Frame.of(gradient(0), R, 1e-2, 2.0)}
    with pytest.raises(ConfigError, match="expected frames of 2 modules, got 1"):
        FedSB(initial(), frames)
