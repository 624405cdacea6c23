"""Dealing examples out: to clients, to the two parts of a client, to a held-out set.

Every random choice comes from a numpy generator made from the seed in the call. No function here
reads or changes global random state.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gradcodec.errors import ConfigError
from gradcodec.recipes.examples import Example

_PARTITION_ATTEMPTS = 200

Indices = npt.NDArray[np.int64]


def dirichlet_partition(
    labels: Sequence[str], clients: int, alpha: float, seed: int, min_size: int = 1
) -> list[Indices]:
    r"""Deal the indices of `labels` to clients, each label in Dirichlet(alpha) proportions.

    As in FedIT/Shepherd: with :math:`p \sim \mathrm{Dir}(\alpha 1_K)` drawn afresh for each
    label, a client that already holds :math:`N/K` or more gets :math:`p_k = 0`, and the rest is
    renormalised. The whole partition is redrawn until no client is below `min_size`.

    Args:
        labels: Category of each of the N examples.
        clients: Number K of clients.
        alpha: Concentration; small values give clients that see few labels.
        seed: Seed of the draw.
        min_size: Fewest examples of a client.

    Returns:
        K sorted index arrays; together they hold each of ``0..N-1`` once.

    Raises:
        ConfigError: A setting is out of range, or no draw met `min_size`.
    """
    total = len(labels)
    if clients < 1:
        raise ConfigError(f"clients must be at least 1, got {clients}")
    if not (alpha > 0 and np.isfinite(alpha)):
        raise ConfigError(f"alpha must be positive and finite, got {alpha}")
    if min_size < 0 or min_size * clients > total:
        raise ConfigError(
            f"{clients} clients with at least {min_size} examples each need "
            f"{min_size * clients} examples, there are {total}"
        )
    rng = np.random.default_rng(seed)
    _, codes = np.unique(np.asarray(labels, dtype=np.str_), return_inverse=True)
    by_label = [np.flatnonzero(codes == code) for code in range(codes.max(initial=-1) + 1)]
    best: list[int] = []
    for _ in range(_PARTITION_ATTEMPTS):
        parts = _draw_partition(by_label, clients, alpha, rng)
        sizes = sorted(len(part) for part in parts)
        if sizes[0] >= min_size:
            return parts
        best = max(best, sizes)
    raise ConfigError(
        f"no Dirichlet draw out of {_PARTITION_ATTEMPTS} gave each of {clients} clients "
        f"{min_size} examples; the best one reached sizes {best}. "
        "Use a larger alpha (--dirichlet), fewer clients or a smaller min_size (--min-client)"
    )


def split_d1_d2(
    indices: npt.ArrayLike, fraction: float = 0.3, seed: int = 0
) -> tuple[Indices, Indices]:
    """Split one client's examples at random into D1 (`fraction` of them) and D2 (the rest).

    D2 is never empty; D1 is empty only for a single example or a `fraction` of zero.

    Returns:
        Two sorted arrays, disjoint, together all of `indices`.

    Raises:
        ConfigError: There are no indices, or `fraction` is outside [0, 1).
    """
    given = np.asarray(indices, dtype=np.int64).reshape(-1)
    if len(given) == 0:
        raise ConfigError("cannot split a client without examples")
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"fraction must be in [0, 1), got {fraction}")
    count = round(fraction * len(given)) if fraction else 0
    if fraction and count == 0:
        count = 1
    count = min(count, len(given) - 1)
    shuffled = np.random.default_rng(seed).permutation(given)
    return np.sort(shuffled[:count]), np.sort(shuffled[count:])


def held_out(
    examples: Sequence[Example], count: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out `count` examples, of each label in proportion to its size (largest remainder).

    Returns:
        ``(kept, held)``, both in the order of `examples`.

    Raises:
        ConfigError: `count` is not in ``0..len(examples) - 1``.
    """
    if not 0 <= count < max(len(examples), 1):
        raise ConfigError(f"cannot hold out {count} of {len(examples)} examples")
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_label.setdefault(example.label, []).append(index)
    names = sorted(by_label)
    exact = np.array([count * len(by_label[name]) / max(len(examples), 1) for name in names])
    quota = np.floor(exact).astype(np.int64)
    # Equal remainders are common (many small labels): break ties at random, not by name.
    order = np.lexsort((rng.random(len(names)), quota - exact))
    quota[order[: count - int(quota.sum())]] += 1
    held: set[int] = set()
    for name, size in zip(names, quota, strict=True):
        held.update(rng.permutation(by_label[name])[:size].tolist())
    return (
        [example for index, example in enumerate(examples) if index not in held],
        [example for index, example in enumerate(examples) if index in held],
    )


def _draw_partition(
    by_label: list[npt.NDArray[np.intp]], clients: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    total = sum(len(members) for members in by_label)
    parts: list[list[npt.NDArray[np.intp]]] = [[] for _ in range(clients)]
    sizes = np.zeros(clients, dtype=np.int64)
    for members in by_label:
        still_open = sizes < total / clients  # never all closed while a label is left to deal
        weights = rng.dirichlet(np.full(clients, alpha)) * still_open
        if not weights.sum() > 0:  # a tiny alpha put everything on a closed client
            weights = still_open.astype(np.float64)
        cuts = (np.cumsum(weights / weights.sum())[:-1] * len(members)).astype(np.int64)
        for client, part in enumerate(np.split(rng.permutation(members), cuts)):
            parts[client].append(part)
            sizes[client] += len(part)
    empty = np.empty(0, dtype=np.int64)
    return [np.sort(np.concatenate([empty, *part]).astype(np.int64)) for part in parts]
