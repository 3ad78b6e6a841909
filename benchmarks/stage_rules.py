"""Compare the stages of rules that know nothing of the devices with those that this package finds, simulated.

The model is a transformer of 24 blocks with an embedding, which takes hardly any time and holds many parameters, and a
head, which takes the time of two blocks and holds as many parameters as the embedding. The rules are written from the
documentation of each system:

* equal numbers of blocks, the embedding with the first of them and the head with the last, as Megatron-LM divides;
* equal numbers of parameters, as DeepSpeed's ``partition_method="parameters"`` divides;
* equal numbers of layers, with the embedding and the head as one layer each, as torchtitan divides.

They take ranks as they come. Here each gets the better one of the given order and its reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from lightning_hetero.balance.pipeline.orders.choice import choose_order
from lightning_hetero.balance.pipeline.orders.search import OrderProblem
from lightning_hetero.balance.pipeline.plan import plan_pipeline
from lightning_hetero.balance.pipeline.simulation import simulate_pipeline
from lightning_hetero.balance.pipeline.stages import LayerCosts, StagePlan

__all__ = ["DEVICES", "RULES", "fractions"]

BLOCKS, MICRO_BATCHES = 24, 8
_BLOCK_S = 0.010
# Forward seconds of each layer; a backward pass takes twice as long.
FORWARD_S = [0.0005, *[_BLOCK_S] * BLOCKS, 2 * _BLOCK_S]
# Of a small language model: 12 * 1024² values per block, 50,000 * 1,024 of the embedding and of the head.
PARAMETERS = [51.2e6, *[12.6e6] * BLOCKS, 51.2e6]
DEVICES: dict[str, tuple[float, ...]] = {
    "1:1": (1, 1),
    "1:2": (2, 1),
    "1:2:4": (4, 2, 1),
    "1:1:2": (2, 1, 1),
    "1:4": (4, 1),
    "1:2:2:4": (4, 2, 2, 1),
}


def equal_blocks(stages: int) -> list[int]:
    """Return the ends of stages with equal numbers of blocks."""
    ends = [1 + round(BLOCKS * (stage + 1) / stages) for stage in range(stages)]
    return [*ends[:-1], BLOCKS + 2]


def equal_layers(stages: int) -> list[int]:
    """Return the ends of stages with equal numbers of layers."""
    return [round((BLOCKS + 2) * (stage + 1) / stages) for stage in range(stages)]


def equal_parameters(stages: int) -> list[int]:
    """Return the ends of stages whose numbers of parameters are as equal as whole layers allow."""
    sums = list(accumulate(PARAMETERS))
    ends = [
        1 + min(range(len(sums)), key=lambda layer: abs(sums[layer] - sums[-1] * (stage + 1) / stages))
        for stage in range(stages)
    ]
    return ends


RULES: dict[str, Callable[[int], list[int]]] = {
    "equal blocks": equal_blocks,
    "equal parameters": equal_parameters,
    "equal layers": equal_layers,
}


def fractions(speeds: Sequence[float]) -> dict[str, float]:
    """Return which fraction of the limit each rule reaches under "1f1b", and this package under "1f1b" and "auto".

    The limit is a step in which no device ever waits.
    """
    layers = [(seconds, 2 * seconds) for seconds in FORWARD_S]
    costs = LayerCosts.of_speeds(layers, speeds)
    half = tuple(tuple(seconds / 2 for seconds in row) for row in costs.backward_s)
    splittable = LayerCosts(costs.forward_s, costs.backward_s, half, half)
    limit_s = MICRO_BATCHES * sum(forward + backward for forward, backward in layers) / sum(speeds)
    ranks = tuple(range(len(speeds)))
    found = {
        name: max(limit_s / _step_s(costs, StagePlan(order, tuple(rule(len(ranks))))) for order in (ranks, ranks[::-1]))
        for name, rule in RULES.items()
    }
    found["1f1b"] = limit_s / _step_s(costs, plan_pipeline(costs, MICRO_BATCHES, "1f1b", 0.0, None, 0))
    most = max(4, len(ranks) + 1)  # micro-batches in memory
    choice = choose_order(OrderProblem(splittable, MICRO_BATCHES, 0, 0.0, None, most, split=True))
    found["auto"] = limit_s / choice.step_s
    return found


def _step_s(costs: LayerCosts, plan: StagePlan) -> float:
    return simulate_pipeline(costs.of_stages(plan), MICRO_BATCHES, "1f1b").step_s


def main() -> None:
    """Print the table of docs/explanation/published_rules.md."""
    print("| devices |", " | ".join((*RULES, '`hetero_pipeline`, "1f1b"', '`hetero_pipeline`, "auto"')), "|")
    print("|---|" + "---|" * (len(RULES) + 2))
    for name, speeds in DEVICES.items():
        print(f"| {name} |", " | ".join(f"{value:.2f}" for value in fractions(speeds).values()), "|")


if __name__ == "__main__":
    main()
