"""Shares of the devices of a machine before a training has measured them, and what to make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.device_report import DeviceReport
from lightning_hetero.balance.tuning.prior import nominal_shares

__all__ = ["FirstGuess", "first_guess"]

_ALIKE = 1.05  # LoadBalancer changes nothing for less either


@dataclass(frozen=True)
class FirstGuess:
    """How much of a batch each device should get.

    Attributes:
        shares: one number a device, in their order, the smallest positive one 1; 0 for a device that takes no part.
        sentences: where the shares come from and what to write, for people; the last one is what to write.
    """

    shares: tuple[float, ...]
    sentences: tuple[str, ...]


def first_guess(reports: Sequence[DeviceReport]) -> FirstGuess:
    """Return the shares: by measured speed where all were measured, else by their data, else equal.

    Args:
        reports: the devices of one machine. Processors take part only where there is nothing else.
    """
    ranks = [report for report in reports if not report.is_processor] or list(reports)
    speeds, origin = _speeds(ranks)
    alike = max(speeds) < _ALIKE * min(speeds)
    least = min(speeds)
    shares = [1.0] * len(ranks) if alike else [float(f"{speed / least:.3g}") for speed in speeds]
    if len(ranks) == 1:
        return FirstGuess(_spread_out(reports, ranks, shares), _alone(ranks[0]))
    written = f"HeteroDDPStrategy(shares=[{', '.join(f'{share:g}' for share in shares)}])"
    automatic = f'Trainer(strategy="hetero_ddp", devices={len(ranks)})'
    use = (
        f"To use: {automatic}, which finds the shares by itself."
        if alike
        else f"To use: {automatic}, which finds the shares by itself, or, with these fixed, {written}."
    )
    return FirstGuess(_spread_out(reports, ranks, shares), (origin, use))


def _speeds(ranks: Sequence[DeviceReport]) -> tuple[list[float], str]:
    """Return one positive number a rank, and where they come from."""
    measured = [rank.measured.samples_per_s for rank in ranks if rank.measured]
    if len(measured) == len(ranks):
        if max(measured) < _ALIKE * min(measured):
            return measured, "Equal shares: the measured speeds differ by less than 5 %."
        return measured, "The shares are the measured speeds."
    nominal = nominal_shares([rank.profile("") for rank in ranks])
    if nominal is not None:
        return nominal, "The shares are cores times clock, as data sheets would compare; --measure knows better."
    why = (
        f"all devices are {ranks[0].name}"
        if len({rank.name for rank in ranks}) == 1
        else "the speed of at least one device is unknown"
    )
    return [1.0] * len(ranks), f"Equal shares, because {why}; lightning-hetero probe --measure compares them."


def _alone(rank: DeviceReport) -> tuple[str, str]:
    why = (
        "it has no accelerator, and ranks on one processor are alike"
        if rank.is_processor
        else f"{rank.device} is its only accelerator"
    )
    return (
        f"Nothing to divide on this machine: {why}.",
        'To use together with other machines: HeteroDDPStrategy(shares="auto"), which is the default.',
    )


def _spread_out(
    reports: Sequence[DeviceReport], ranks: Sequence[DeviceReport], shares: Sequence[float]
) -> tuple[float, ...]:
    of_rank = {rank.device: share for rank, share in zip(ranks, shares, strict=True)}
    return tuple(of_rank.get(report.device, 0.0) for report in reports)
