"""LoRA factors (r = 16 on q and v) of Llama-3.2-1B's geometry, 1,703,936 values, and a quadratic.

Every node's loss is half the squared distance to a point of its own. Points of nodes share a part
of low rank, so that a subspace can be fitted. Nothing here says anything about quality.
"""

import torch
from torch import nn

NODES, LAYERS, WIDTH, KEYS, RANK = 2, 16, 2048, 512, 16
LR = 0.3


class Task:
    """Parameters by name, and one step of SGD for each round."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        self.parameters = {}
        for layer in range(LAYERS):
            for name, out in (("q", WIDTH), ("v", KEYS)):
                stem = f"layers.{layer}.{name}_proj.lora"
                start = torch.randn(RANK, WIDTH, generator=g) / WIDTH**0.5
                self.parameters[f"{stem}_A.weight"] = nn.Parameter(start)
                self.parameters[f"{stem}_B.weight"] = nn.Parameter(torch.zeros(out, RANK))

    def goals(self, node: int | None) -> list[torch.Tensor]:
        """The point of a node; of ``None``, what all points share."""
        g = torch.Generator().manual_seed(1)
        own = torch.Generator().manual_seed(2 + (node or 0))
        out = []
        for p in self.parameters.values():
            long, short = max(p.shape), min(p.shape)
            shared = torch.randn(long, 4, generator=g) @ torch.randn(4, short, generator=g) / 4
            noise = torch.randn(long, short, generator=own) * (0.2 if node is not None else 0.0)
            goal = 0.1 * (shared + noise)
            out.append(goal if p.shape[0] == long else goal.T)
        return out

    def loss(self, node: int | None) -> torch.Tensor:
        """Mean over values of half the squared distance to a point."""
        pairs = zip(self.parameters.values(), self.goals(node), strict=True)
        return torch.stack([(p - goal).square().sum() / 2 for p, goal in pairs]).sum()

    def evaluate(self) -> float:
        """The distance to what all nodes share."""
        with torch.no_grad():
            return float(self.loss(None))


def load(task: Task, arrays: dict[str, torch.Tensor]) -> None:
    """Put received values into the parameters."""
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(arrays[name])
