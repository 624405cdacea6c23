"""Gradients of the frozen weights that adapters sit on: what Fed-SB starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.federated.world import World
from benchmarks.peers.federated.fed_sb import A, B, Frame


def frames(world: World, lr: float, clients: int = 4) -> dict[str, Frame]:
    """Fed-SB's frames from the gradients of some clients' D1 at the start."""
    total: dict[str, Tensor] = {}
    for client in range(clients):
        for name, gradient in _gradients(world, client).items():
            total[name] = total.get(name, 0) + gradient
    s = world.settings
    scale = s.lora_alpha / s.lora_r
    return {n: Frame.of(g, s.lora_r, lr, scale) for n, g in total.items()}


def _gradients(world: World, client: int) -> dict[str, Tensor]:
    """``dL/dW [out, in]`` by module on one batch, by adapters ``A = I`` and ``B = 0``."""
    names = [n.removesuffix(A) for n in world.initial if n.endswith(A)]
    probes, adapters = {}, {}
    for name in names:
        out, width = len(world.initial[name + B]), world.initial[name + A].shape[1]
        probes[name] = torch.zeros(out, width, device=world.device, requires_grad=True)
        adapters[name + A] = torch.eye(width, device=world.device)
        adapters[name + B] = probes[name]
    batch = world.d1[client][: world.settings.local.batch]
    world.net([adapters], [batch]).sum().backward()
    return {n: p.grad.cpu() for n, p in probes.items() if p.grad is not None}
