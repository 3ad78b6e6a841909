"""Several nodes: even, uneven, with a link between them, under torchrun and in an environment like SLURM's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.job import Fault
from faults.launch import Command, assert_whole, attempts, by_hand, found, job, run, torchrun
from harness import free_port
from profiles import THOROUGH, thorough

LINK = Path(__file__).parents[2] / "benchmarks" / "link.py"


def node(number: int, ranks: int, argument: str, address: str, port: int, restarts: int = 0, **how: bool) -> Command:
    """Return the command of one of two nodes; the first keeps the rendezvous."""
    return torchrun(
        argument,
        "--nnodes=2",
        f"--nproc-per-node={ranks}",
        f"--max-restarts={restarts}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={address}:{port}",
        "--rdzv-id=faults",
        f"--rdzv-conf=is_host={'true' if number == 0 else 'false'},join_timeout=120,last_call_timeout=1",
        f"--local-addr={address if number == 0 else '127.0.0.1'}",
        **how,
    )


def assert_written_once(folder: Path, steps: int) -> None:
    """One rank writes checkpoints and logs, whatever the nodes."""
    lines = (folder / "logs" / "metrics.csv").read_text(encoding="utf-8").splitlines()
    header, *rows = [line.split(",") for line in lines]
    logged = [row[header.index("step")] for row in rows if row[header.index("loss_step")]]
    assert len(logged) == len(set(logged)) == steps
    assert sorted(path.name for path in folder.glob("*.ckpt")) == sorted({"last.ckpt", *_best(folder)})


def _best(folder: Path) -> list[str]:
    (path,) = folder.glob("epoch=*.ckpt")
    return [path.name]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("here", "there"), [pytest.param(1, 1, marks=thorough), (3, 1)])
def test_two_nodes_train_as_one(tmp_path: Path, here: int, there: int) -> None:
    port, ranks = free_port(), here + there
    settings: dict[str, Any] = {"nodes": 2, "factors": [1, 3, 1, 2][:ranks]}
    arguments = [job(tmp_path, devices, **settings) for devices in (here, there)]
    as_users = THOROUGH or ranks == 2
    commands = [node(n, (here, there)[n], arguments[n], "127.0.0.1", port, script=as_users) for n in range(2)]
    for ended in run(tmp_path, commands):
        assert ended.status == 0, ended.text
    assert_whole(tmp_path, ranks)
    # which of the nodes is the first is for torchrun to say
    placed = [(result["node"], result["local_rank"]) for result in found(tmp_path, ranks)]
    sizes = [sum(where == number for where, _ in placed) for number in range(2)]
    assert sorted(sizes) == sorted((here, there))
    assert placed == [(number, local) for number in range(2) for local in range(sizes[number])]
    assert_written_once(tmp_path, 33)


@pytest.mark.timeout(300)
def test_a_rank_of_another_node_is_killed(tmp_path: Path) -> None:
    """torchrun starts the ranks of both nodes again, and counts the restart on one of them only."""
    port = free_port()
    argument = job(tmp_path, 1, Fault(1, "kill", "step", 14), nodes=2, factors=[1, 3])
    for ended in run(tmp_path, [node(n, 1, argument, "127.0.0.1", port, restarts=2) for n in range(2)]):
        assert ended.status == 0, ended.text
    assert attempts(tmp_path) == [0, 12]
    assert_whole(tmp_path, 2)


@pytest.mark.timeout(120)
def test_devices_that_torchrun_has_not_started_are_refused(tmp_path: Path) -> None:
    """Two processes here, but the script says three: answered before anything communicates."""
    (ended,) = run(tmp_path, [torchrun(job(tmp_path, 3), "--standalone", "--nproc-per-node=2")], timeout_s=100)
    assert ended.status != 0
    assert "`devices` must be the number of processes that torchrun has started on this node (2), got 3" in ended.text
    assert 'devices=int(os.environ["LOCAL_WORLD_SIZE"])' in ended.text


def link() -> Any:
    """Return the benchmarks' two nodes, or skip the test where they cannot be made."""
    spec = importlib.util.spec_from_file_location("link", LINK)
    if spec is None or spec.loader is None or not LINK.exists():
        pytest.skip("the benchmarks are not here")
    module = importlib.util.module_from_spec(spec)
    sys.modules["link"] = module  # which dataclasses look up
    spec.loader.exec_module(module)
    if not module.available():
        pytest.skip("needs root, `ip`, `tc`, `unshare` and the right to make network namespaces")
    return module


@thorough
@pytest.mark.timeout(300)
def test_two_nodes_with_a_slow_link(tmp_path: Path) -> None:
    """A network namespace and a host name each, and 10 Mbit/s between them."""
    port = free_port()
    with link().linked_nodes(10) as nodes:
        argument = job(tmp_path, 1, nodes=2, factors=[1, 3])
        commands, environments = [], []
        for its in nodes:
            command = node(its.rank, 1, argument, nodes[0].address, port, script=True)
            assert isinstance(command, list)
            command[command.index(next(c for c in command if c.startswith("--local-addr")))] = (
                f"--local-addr={its.address}"
            )
            commands.append(its.command(*command))
            environments.append({"GLOO_SOCKET_IFNAME": its.interface})
        for ended in run(tmp_path, commands, environments):
            assert ended.status == 0, ended.text
    assert_whole(tmp_path, 2)


# ---- SLURM -----------------------------------------------------------------------------------------------------------


def slurm(ranks_of_nodes: list[int]) -> list[dict[str, str]]:
    """Return the environment of each rank, as srun makes it."""
    places = [(number, local) for number, ranks in enumerate(ranks_of_nodes) for local in range(ranks)]
    port = free_port()
    return [
        {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "training",
            "SLURM_NTASKS": str(len(places)),
            "SLURM_NNODES": str(len(ranks_of_nodes)),
            "SLURM_NODELIST": "127.0.0.1",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(local),
            "SLURM_NODEID": str(number),
            # what srun sets where each node has as many; by hand, that of the node, where they have not
            "SLURM_NTASKS_PER_NODE": str(ranks_of_nodes[number]),
            "MASTER_PORT": str(port),
        }
        for rank, (number, local) in enumerate(places)
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "ranks_of_nodes", [pytest.param([2], marks=thorough), [2, 1]], ids=["one node", "uneven nodes"]
)
def test_an_environment_like_slurms(tmp_path: Path, ranks_of_nodes: list[int]) -> None:
    ranks = sum(ranks_of_nodes)
    settings: dict[str, Any] = {"nodes": len(ranks_of_nodes), "factors": [1, 3, 2][:ranks]}
    commands = [by_hand(job(tmp_path, devices, **settings)) for devices in ranks_of_nodes for _ in range(devices)]
    for ended in run(tmp_path, commands, slurm(ranks_of_nodes)):
        assert ended.status == 0, ended.text
    assert_whole(tmp_path, ranks)
    assert_written_once(tmp_path, 33)
