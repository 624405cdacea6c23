"""The DDP benchmark: links, dealing of batches, plans, figures whose answers can be read off."""

import itertools
import math
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import rows
from benchmarks.ddp import case as ddp
from benchmarks.ddp import figures
from benchmarks.ddp import page as ddp_page
from benchmarks.ddp.rank import Phase
from benchmarks.ddp.schemes import REFERENCE, SCHEMES, GradientScheme
from benchmarks.ddp.trainers import CollectiveClock
from benchmarks.ddp.turns import BUCKETS
from benchmarks.ddp.work import WORKS, Batches, Recipe, glyphs, kept_data, work_named
from benchmarks.links import link as links
from benchmarks.links import namespaces as link_namespaces
from benchmarks.links import pacing as link_pacing
from benchmarks.links.link import LINKS, Link
from benchmarks.peers.ddp.checkout import EPFML, GRACE, VARIABLE
from benchmarks.run import Options, choose
from gradcodec.errors import ConfigError

# -- links ------------------------------------------------------------------------------------


@given(st.integers(1, 100_000))
def test_a_bucket_lets_a_millisecond_of_the_rate_through_and_no_more(mbit: int) -> None:
    arguments = link_namespaces.tbf(Link("some", mbit))
    bucket = int(arguments[arguments.index("burst") + 1].removesuffix("b"))
    assert arguments[:3] == ["tbf", "rate", f"{mbit}mbit"]
    assert bucket == max(16_384, mbit * 125)


def test_there_is_nothing_to_shape_on_an_unshaped_link() -> None:
    with pytest.raises(ConfigError, match="no rate"):
        link_namespaces.tbf(LINKS["unshaped"])


@given(st.integers(1, 100_000), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_the_wire_takes_eight_seconds_per_megabyte_and_mbit(mbit: int, a: int, b: int) -> None:
    link = Link("some", mbit)
    assert link.seconds(a) == pytest.approx(8 * a / (mbit * 1e6))
    assert link.seconds(a + b) == pytest.approx(link.seconds(a) + link.seconds(b))
    assert LINKS["unshaped"].seconds(a) == 0


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 Mbit/s, got 0"):
        Link("none", 0)


@given(st.integers(1, 100_000), st.integers(2, 64))
def test_neighbours_share_a_paced_rank_s_rate(mbit: int, world: int) -> None:
    link = Link("some", mbit)
    each = link_pacing.rate_per_neighbour(link, world)
    assert link.bytes_per_second is not None
    assert 0 <= link.bytes_per_second - each * (world - 1) < world


TABLE = """Inter-|   Receive                                      |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop
    lo:     347    1206    0    0    0     0          0         0     111     1206    0    0
  eth0: 7061984   14187    0    0    0     0          0         0  763102     8983    0    0
"""


def test_sent_bytes_are_the_ninth_counter_of_the_interface() -> None:
    assert link_namespaces.sent_bytes(TABLE, "eth0") == 763_102
    assert link_namespaces.sent_bytes(TABLE, "lo") == 111
    with pytest.raises(ConfigError, match="no interface 'eth1'"):
        link_namespaces.sent_bytes(TABLE, "eth1")


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        with client, server.accept()[0] as accepted:
            yield client, accepted


def test_a_paced_connection_keeps_its_rate(
    connection: tuple[socket.socket, socket.socket],
) -> None:
    client, _ = connection
    link_pacing.pace(client, 12_500_000)
    kept = client.getsockopt(socket.SOL_SOCKET, link_pacing.SO_MAX_PACING_RATE, 8)
    assert int.from_bytes(kept, "little") == 12_500_000


def test_tcp_counts_what_was_sent(connection: tuple[socket.socket, socket.socket]) -> None:
    client, accepted = connection
    client.sendall(b"x" * 54_321)
    left = 54_321
    while left:
        left -= len(accepted.recv(left))
    assert link_pacing.bytes_sent(client) == 54_321
    assert link_pacing.bytes_sent(accepted) == 0


def test_only_connected_tcp_sockets_are_found(
    connection: tuple[socket.socket, socket.socket],
) -> None:
    names = {s.getsockname() for s in connection}
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        link_pacing.connections() as found,
    ):
        there = {s.getsockname() for s in found}
        assert names <= there
        assert listening.getsockname() not in there - names
        assert all(s.type == socket.SOCK_STREAM for s in found)
        assert datagrams.fileno() not in {s.fileno() for s in found}


def test_an_unknown_kind_of_link_is_refused() -> None:
    with pytest.raises(ConfigError, match="'namespaces' or 'pacing', got 'tunnel'"):
        links.network(2, "tunnel")


def test_namespaces_are_shaped_and_leave_nothing_behind() -> None:
    reason = link_namespaces.unavailable()
    if reason:
        pytest.skip(f"needs root, or a user namespace, and iproute2: {reason}")
    with link_namespaces.Namespaces(2) as made:
        name = made.place(1).namespace
        assert _qdisc(name).split()[1] != "tbf"
        made.shape(LINKS["100mbit"])
        assert "rate 100Mbit" in _qdisc(name)
        made.shape(LINKS["unshaped"])
        made.shape(LINKS["unshaped"])
        assert "tbf" not in _qdisc(name)
    assert not (Path("/run/netns") / name).exists()


def _qdisc(namespace: str) -> str:
    command = ("tc", "-n", namespace, "qdisc", "show", "dev", "eth0")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# -- works ------------------------------------------------------------------------------------


@given(st.integers(10, 400))
def test_the_rate_rises_over_a_tenth_to_the_peak_and_falls_to_nothing(steps: int) -> None:
    rates = [Recipe("sgd", 0.1, steps, 8).rate(step, steps) for step in range(steps)]
    top = steps // 10
    assert rates[top] == 1.0
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 0.1 + 3 / steps


@pytest.fixture(scope="module")
def few_glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    images, labels = glyphs(96, torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("data") / "few.safetensors"
    from safetensors.torch import save_file

    data = {"train.0": images[:72], "train.1": labels[:72]}
    data |= {"held_out.0": images[72:], "held_out.1": labels[72:]}
    save_file({name: tensor.clone() for name, tensor in data.items()}, path)
    return path


@pytest.mark.parametrize("step", [0, 3, 8, 9, 100])
def test_ranks_share_a_batch_that_is_the_same_for_any_number_of_them(
    few_glyphs: Path, step: int
) -> None:
    recipe = Recipe("sgd", 0.1, 10, 8)
    whole = Batches(few_glyphs, recipe, 5, 0, 1).step(step)
    for world in (2, 4):
        shares = [Batches(few_glyphs, recipe, 5, rank, world).step(step) for rank in range(world)]
        for i, tensor in enumerate(whole):
            together = torch.empty_like(tensor)
            for rank, share in enumerate(shares):
                together[rank::world] = share[i]
            assert torch.equal(together, tensor)


def test_a_pass_shows_every_example_once(few_glyphs: Path) -> None:
    batches = Batches(few_glyphs, Recipe("sgd", 0.1, 10, 8), 5, 0, 1)
    first, second = (
        torch.cat([batches.step(step)[0] for step in steps]).flatten(1).sum(1)
        for steps in (range(9), range(9, 18))
    )
    assert not torch.equal(first, second)
    assert torch.equal(first.sort().values, second.sort().values)


def test_ranks_share_the_held_out_examples(few_glyphs: Path) -> None:
    recipe = Recipe("sgd", 0.1, 10, 8)
    seen = [
        len(batch[1])
        for rank in range(2)
        for batch in Batches(few_glyphs, recipe, 5, rank, 2).held_out(4)
    ]
    assert seen == [4] * 6


def test_ranks_that_do_not_divide_the_batch_are_refused(few_glyphs: Path) -> None:
    with pytest.raises(ConfigError, match="divide the batch of 8, got 3"):
        Batches(few_glyphs, Recipe("sgd", 0.1, 10, 8), 5, 0, 3)


def test_glyphs_are_a_function_of_the_seed() -> None:
    one, two, other = (glyphs(16, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    assert one[0].shape == (16, 1, 32, 32)


def test_every_parameter_of_the_vision_model_is_trained() -> None:
    model = WORKS["vision"].model(0)
    images, labels = glyphs(4, torch.Generator().manual_seed(0))
    model(images, labels).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_an_unknown_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown work 'chess'"):
        work_named("chess")


# -- schemes and plans --------------------------------------------------------------------------


def chosen(*names: str, quick: bool = False) -> list[GradientScheme]:
    return choose(SCHEMES, Options(Path(), quick=quick, schemes=names or None), REFERENCE)


def test_plain_ddp_is_always_there_and_first() -> None:
    assert [s.name for s in chosen("int4", "demo")] == [REFERENCE, "int4", "demo"]
    assert chosen()[0].name == chosen(quick=True)[0].name == REFERENCE
    with pytest.raises(ConfigError, match="did you mean 'int8' or 'int4'"):
        chosen("int5")


def test_a_peer_that_is_not_there_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "git clone https://github.com/epfml/powersgd" in (EPFML.missing() or "")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert "no grace/grace_dl/dist/__init__.py in" in (GRACE.missing() or "")
    with pytest.raises(ImportError, match="checkout f07be92"):
        EPFML.module("powersgd")
    there = tmp_path / EPFML.folder / EPFML.file
    there.parent.mkdir(parents=True)
    there.touch()
    assert EPFML.missing() is None


def test_schemes_that_look_at_the_link_are_trained_to_the_end_on_each() -> None:
    for scheme in SCHEMES.values():
        phases = ddp.phases(scheme, 160, quick=False, confirm=False)
        assert [p.link for p in phases] == ["unshaped", "1gbit", "100mbit"]
        assert phases[0].steps == 160
        whole = {p.steps == 160 for p in phases[1:]}
        assert whole == {not scheme.alike}
        assert all(p.steps > scheme.settle for p in phases)


def test_what_has_rows_is_not_run_again(tmp_path: Path) -> None:
    runs = ddp.planned(Options(out=tmp_path), [SCHEMES[REFERENCE], SCHEMES["int4"]])
    assert {run.world for run in runs} == {2, 4}
    run = runs[0]
    done = {**run.stamp(), "link": "unshaped", "asked": run.phases[0].steps}
    assert [p.link for p in ddp.missing(run, [])] == ["unshaped", "1gbit", "100mbit"]
    assert [p.link for p in ddp.missing(run, [done])] == ["1gbit", "100mbit"]
    assert len(ddp.missing(run, [{**done, "failed": "died"}])) == 3


def test_the_clock_gives_collectives_back() -> None:
    kept, clock = dist.all_reduce, CollectiveClock()
    with clock.running():
        assert dist.all_reduce is not kept
    assert dist.all_reduce is kept


# -- figures ----------------------------------------------------------------------------------

LOSSES = [(0, 5.0, 0.0), (5, 4.0, 5.0), (10, 2.0, 10.0)]


def row(
    scheme: str = REFERENCE,
    link: str = "unshaped",
    *,
    last: float = 2.0,
    sent: int = 1000,
    step: float = 1.0,
    steps: int = 10,
    seed: int = 0,
    **more: Any,
) -> rows.Row:
    """One link of a run of 10 steps; a run on another link than the unshaped one is short."""
    whole = link == "unshaped"
    evaluations = [(s, last if s == 10 else loss, t) for s, loss, t in LOSSES]
    return {
        "run": f"{scheme}-{seed}-{steps}",
        "scheme": scheme,
        "seed": seed,
        "config": {"work": "llama", "world": 2, "lr": 0.1, "steps": steps},
        "versions": {"torch": "2"},
        "commit": "abc",
        "machine": "here",
        "network": "pacing",
        "link": link,
        "asked": steps if whole else 4,
        "whole": whole,
        "diverged": False,
        "evaluations": evaluations,
        "path": ["0x1"],
        "settle": 2,
        "settle_s": 4 * step,
        "p50_s": step,
        "compute_s": step / 2,
        "sent": sent,
        "replicas_equal": True,
        "notes": {},
        **more,
    }


def written(path: Path, *some: rows.Row) -> Path:
    for each in some:
        rows.append(path, each)
    return path


def group(path: Path, *some: rows.Row) -> figures.Group:
    return figures.load(written(path / "ddp.jsonl", *some))["llama", 2][0]


def test_first_steps_take_what_they_took_and_each_further_one_the_median() -> None:
    short = row(link="100mbit", step=3.0)
    assert [figures.taken(short, n) for n in (0, 1, 2, 3, 10)] == [0, 6, 12, 15, 36]


def test_seconds_elsewhere_are_the_unshaped_losses_at_the_link_s_pace(tmp_path: Path) -> None:
    trained = group(tmp_path, row(), row(link="100mbit", step=3.0))[REFERENCE]
    assert trained.curve("unshaped") == [(0, 0.0, 5.0), (5, 5.0, 4.0), (10, 10.0, 2.0)]
    assert trained.curve("100mbit") == [(0, 0.0, 5.0), (5, 21.0, 4.0), (10, 36.0, 2.0)]
    assert trained.curve("1gbit") is None


def test_a_whole_training_on_a_link_has_its_own_seconds_and_losses(tmp_path: Path) -> None:
    own = [(0, 5.0, 0.0), (10, 3.0, 77.0)]
    slow = row("auto", "100mbit", whole=True, asked=10, evaluations=own)
    trained = group(tmp_path, row(), row("auto"), slow)["auto"]
    assert trained.curve("100mbit") == [(0, 0.0, 5.0), (10, 77.0, 3.0)]
    assert (trained.loss("unshaped"), trained.loss("100mbit"), trained.loss()) == (2.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("loss", "seconds"), [(6.0, 0.0), (4.5, 2.5), (4.0, 5.0), (3.0, 7.5), (2.0, 10.0), (1.9, None)]
)
def test_time_to_a_loss_lies_on_the_line_between_evaluations(
    loss: float, seconds: float | None
) -> None:
    curve = [(step, t, value) for step, value, t in LOSSES]
    found = figures.time_to(curve, loss)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_ratios_are_plain_ddp_s_over_the_scheme_s_on_the_same_link(tmp_path: Path) -> None:
    there = group(
        tmp_path,
        row(sent=1000),
        row(link="100mbit", sent=1100, step=4.0),
        row("int4", sent=100, last=2.02),
        row("int4", "100mbit", sent=110, step=2.0),
        row("sign", sent=10, last=2.2),
        row("sign", "100mbit", sent=11, step=1.0),
    )
    assert figures.ratio(there, "int4") == 10
    assert figures.excess(there, "int4") == pytest.approx(0.01)
    assert figures.step_ratio(there, "int4", "100mbit") == 2
    # The target is 2.02: plain DDP is there 0.01 of the last interval before its end.
    assert figures.speed_up(there, "int4", "100mbit") == pytest.approx(2 * 47.8 / 48)
    assert figures.speed_up(there, "sign", "100mbit") is None
    assert figures.speed_up(there, "sign", "1gbit") is None


def test_trials_and_schemes_without_a_whole_training_do_not_count(tmp_path: Path) -> None:
    there = group(
        tmp_path,
        row(steps=4),
        row("int4", steps=4),
        row(),
        row("sign", "100mbit"),
        row("demo"),
        {**row("topk"), "failed": "died"},
    )
    assert list(there) == [REFERENCE, "demo"]
    assert there[REFERENCE].base["config"]["steps"] == 10


def test_a_later_row_supersedes_an_earlier_one(tmp_path: Path) -> None:
    assert group(tmp_path, row(last=9.0), row(last=2.5))[REFERENCE].loss() == 2.5


def test_what_failed_is_told_until_it_ran(tmp_path: Path) -> None:
    died = {**row("demo"), "failed": "rank 1 died"}
    path = written(tmp_path / "ddp.jsonl", died)
    assert figures.failures(path) == ["llama x2, demo: rank 1 died"]
    assert figures.failures(written(path, row("demo"))) == []


TURNS = {
    "1gbit": {"auto": [0.97, 0.99, 1.0, 1.01, 1.03]},
    "unshaped": {"identity": [1.01, 1.02, 1.04, 1.06, 1.2]},
}


def _goals(there: figures.Group, turns: Any = TURNS) -> list[bool | None]:
    return [goal.met for goal in figures.goals(there, turns)]


def test_goals_are_met_at_their_bounds_and_missed_beyond(tmp_path: Path) -> None:
    def both(name: str, last: float, sent: int, step: float) -> list[rows.Row]:
        return [
            row(name, last=last, sent=sent),
            row(name, "100mbit", last=last, sent=sent, step=step),
        ]

    plain = both(REFERENCE, 2.0, 8000, 5.0)
    good = [*both("int4", 2.009, 1000, 1.9), *both("sign", 2.019, 260, 0.9)]
    peer = both("powersgd", 2.0, 100, 2.0)
    assert _goals(group(tmp_path / "a", *plain, *good, *peer)) == [True] * 6
    bad = [*both("int4", 2.011, 1000, 1.9), *both("sign", 2.021, 260, 0.9)]
    fast = both("powersgd", 2.0, 100, 1.0)
    # What never comes to the target has no time to it, however fast it is.
    found = _goals(group(tmp_path / "b", *plain, *bad, *fast))
    assert found == [False, False, False, False, True, True]


def test_goals_that_were_not_measured_are_neither_met_nor_missed(tmp_path: Path) -> None:
    assert _goals(group(tmp_path, row()), {}) == [None] * 6


def test_turns_are_judged_by_their_quartile_and_median(tmp_path: Path) -> None:
    slow = {
        "1gbit": {"auto": [1.01, 1.02, 1.03, 1.04]},
        "unshaped": {"identity": [1.04, 1.06, 1.07, 1.08]},
    }
    assert _goals(group(tmp_path, row()), slow)[-2:] == [False, False]


def test_turns_are_compared_within_each_turn(tmp_path: Path) -> None:
    blocks = {REFERENCE: [1.0, 2.0, 4.0], "auto": [1.1, 1.0, 4.0]}
    path = written(tmp_path / "ddp.jsonl", {**row(), "link": "1gbit", "blocks": blocks})
    assert figures.beside(path) == {"1gbit": {"auto": [0.5, 1.0, 1.1]}}


def test_the_page_names_what_loses_and_what_is_met(tmp_path: Path) -> None:
    some = [
        row(name, link, step=step, sent=sent)
        for (name, step, sent), link in itertools.product(
            ((REFERENCE, 1.0, 8000), ("int4", 1.5, 1000), ("demo", 0.5, 100)),
            ("unshaped", "100mbit"),
        )
    ]
    path = written(tmp_path / "ddp.jsonl", *some)
    made = ddp_page.page(path)
    assert made is not None
    text = made.write(path)
    page = path.with_suffix(".md").read_text()
    assert (
        "| final loss within 0.5 % of plain DDP at 8x (4 bit) | met | int4: +0.00% at 8.0x |"
        in page
    )
    assert "unshaped: 1 of 2 have longer steps than plain DDP: int4 1.50x" in text
    assert "NO" not in page.split("How to read")[0]
    for name in ("ddp-loss.png", "ddp-time.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert f"({name})" in page


def test_no_rows_make_no_page(tmp_path: Path) -> None:
    assert ddp_page.page(tmp_path / "ddp.jsonl") is None
    assert not (tmp_path / "ddp.md").exists()


# -- a real run -------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_real_ranks_walk_the_same_path_on_two_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ddp.LINKS_VARIABLE, "pacing")
    monkeypatch.setattr(ddp, "DATA", tmp_path)
    monkeypatch.setattr(WORKS["vision"], "train", 64, raising=False)
    monkeypatch.setattr(WORKS["vision"], "held_out", 32, raising=False)
    kept_data(WORKS["vision"], 0, tmp_path)
    phases = (Phase("unshaped", 6), Phase("100mbit", 5))
    run = ddp.Run("vision", 2, REFERENCE, 0, 0.02, 6, phases)
    path = tmp_path / "ddp.jsonl"
    assert ddp.execute([run], path) == []
    fast, slow = rows.read(path)
    parameters = sum(p.numel() for p in WORKS["vision"].model(0).parameters())
    for each in (fast, slow):
        assert each["replicas_equal"]
        assert not each["diverged"]
        # A ring all-reduce of two ranks sends every gradient once; a bound from both sides.
        assert 1.0 <= each["sent"] / (4 * parameters) < 1.1
        assert math.isfinite(each["evaluations"][-1][1])
    assert (fast["link"], slow["link"]) == ("unshaped", "100mbit")
    assert fast["whole"]
    assert not slow["whole"]
    assert slow["path"] == fast["path"][:5]
    assert ddp.execute([run], path) == []
    assert len(rows.read(path)) == 2


def test_the_parts_of_a_step_say_what_is_hidden() -> None:
    """100 ms of compute and 30 of parts in a step of 120: 10 of them cost nothing."""
    row: dict[str, Any] = {
        "compute_s": 0.1,
        "blocks": {name: [0.12, 0.11, 0.13] for name in BUCKETS.beside},
        "parts": {key: {} for key in BUCKETS.beside}
        | {"int4": {"encode": 0.005, "exchange": 0.02, "decode": 0.005}},
    }
    table = {cells[0]: cells[1:] for cells in BUCKETS.parts(row)}
    assert table["int4"] == ("120.0", "100.0", "5.0", "20.0", "5.0", "10.0")
    assert table["plain DDP"] == ("120.0", "100.0", "", "", "", "")
