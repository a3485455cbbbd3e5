"""Weights that are shared out over the processes, each of which keeps its part: torch's FSDP2.

A block's weights are gathered when it runs, and given back after it; gradients, the moments of the optimiser and the
average are shared out as they are. What is saved is whole, and another number of processes can go on with it.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lcm_core.errors import InputError
from trainer.config import DistillConfig
from trainer.distributed import Processes
from trainer.students import Student


def check_sharded(config: DistillConfig) -> None:
    """Refuse what does not go with weights that are shared out.

    Raises:
        InputError: names it.
    """
    if not config.student.sharded:
        return
    unfit = {
        "preview_every": config.report.preview_every,
        "checkpoint_every": config.training.checkpoint_every,
        "base_dtype": config.student.base_dtype,
        "offload": config.student.offload,
        "compile": config.student.compile,
        "precision float16": config.student.precision == "float16",
    }
    if found := [name for name, given in unfit.items() if given]:
        off = "give --preview-every 0" if found[0] == "preview_every" else "leave it out"
        raise InputError(f"{found[0]} does not go with sharded, with which no process has the whole network; {off}")


def shard_student(student: Student, processes: Processes) -> None:
    """Share out all networks of a student; of one process alone nothing changes.

    Until then each process has all of them.
    """
    if processes.size == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(processes.device.type, (processes.size,))
    networks: list[Any] = [student.unet, student.teacher_unet]
    if student.adapters is None:  # else these are parts of the network
        networks += [student.average, student.critic]
    for network in networks:
        if network is not None:
            _shard(network, mesh)


def _shard(network: Any, mesh: Any) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for block in [*_blocks(network), network]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)  # or an average, without backward pass, stays whole
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # each process gives its share of the loss, so that gradients are sums; gloo has no scaled ones
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """The parts that are gathered one after the other: those that diffusers says are not to be split; those inside of
    others first, as FSDP wants them."""
    names = set(getattr(network, "_no_split_modules", None) or ())
    return [module for module in network.modules() if type(module).__name__ in names][::-1]
