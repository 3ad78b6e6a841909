"""Guess the shares of a machine's devices before a training measures them, and suggest how to use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_hetero.balance.device_report import DeviceReport
from lightning_hetero.balance.tuning.prior import nominal_shares

__all__ = ["FirstGuess", "first_guess"]

_ALIKE = 1.05  # LoadBalancer ignores smaller differences, too


@dataclass(frozen=True)
class FirstGuess:
    """The suggested shares of the devices.

    Attributes:
        shares: One number per device, in their order, the smallest positive one being 1; 0 for a device that takes no
            part.
        notes: Notes for the user: where the shares come from, and finally the code to write.
    """

    shares: tuple[float, ...]
    notes: tuple[str, ...]


def first_guess(reports: Sequence[DeviceReport]) -> FirstGuess:
    """Return shares by measured speed if all were measured, else by nominal speed, else equal ones.

    Args:
        reports: Devices of one machine. The processor takes part only if there is no accelerator.
    """
    ranks = [report for report in reports if not report.is_processor] or list(reports)
    speeds, origin = _speeds(ranks)
    alike = max(speeds) < _ALIKE * min(speeds)
    least = min(speeds)
    shares = [1.0] * len(ranks) if alike else [float(f"{speed / least:.3g}") for speed in speeds]
    if len(ranks) == 1:
        return FirstGuess(_shares_of_devices(reports, ranks, shares), _alone(ranks[0]))
    written = f"HeteroDDPStrategy(shares=[{', '.join(f'{share:g}' for share in shares)}])"
    automatic = f'Trainer(strategy="hetero_ddp", devices={len(ranks)})'
    use = (
        f"To use: {automatic}, which finds the shares by itself."
        if alike
        else f"To use: {automatic}, which finds the shares by itself; or {written}, which fixes these shares."
    )
    return FirstGuess(_shares_of_devices(reports, ranks, shares), (origin, use))


def _speeds(ranks: Sequence[DeviceReport]) -> tuple[list[float], str]:
    """Return one positive number per rank, and a note on where they come from."""
    measured = [rank.measured.samples_per_s for rank in ranks if rank.measured]
    if len(measured) == len(ranks):
        if max(measured) < _ALIKE * min(measured):
            return measured, "Equal shares: the measured speeds differ by less than 5 %."
        return measured, "The shares are the measured speeds."
    nominal = nominal_shares([rank.profile("") for rank in ranks])
    if nominal is not None:
        return nominal, "The shares are cores times clock, as in a data sheet; --measure gives better ones."
    why = (
        f"all devices are {ranks[0].name}"
        if len({rank.name for rank in ranks}) == 1
        else "the speed of at least one device is unknown"
    )
    return [1.0] * len(ranks), f"Equal shares, because {why}; lightning-hetero probe --measure compares their speeds."


def _alone(rank: DeviceReport) -> tuple[str, str]:
    why = (
        "it has no accelerator, and ranks on one processor are equally fast"
        if rank.is_processor
        else f"{rank.device} is its only accelerator"
    )
    return (
        f"There is nothing to divide on this machine: {why}.",
        'To use it with other machines: HeteroDDPStrategy(shares="auto"), which is the default.',
    )


def _shares_of_devices(
    reports: Sequence[DeviceReport], ranks: Sequence[DeviceReport], shares: Sequence[float]
) -> tuple[float, ...]:
    share_of = {rank.device: share for rank, share in zip(ranks, shares, strict=True)}
    return tuple(share_of.get(report.device, 0.0) for report in reports)
