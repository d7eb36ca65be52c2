"""What processes of one torch.distributed group tell each other; without a group, nothing.

A group is what ``torchrun`` and ``torch.distributed.init_process_group`` make. Without one, or in a
group of one process, every function here gives back what it was given. Tensors travel where the
group's backend wants them, on the CPU for gloo, on the GPU for nccl, and come back to where they
were. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)  # a dtype travels as its number here


@contextlib.contextmanager
def group_of_torchrun() -> Iterator[None]:
    """Join the other processes inside the block, if torchrun has started this one.

    The backend is nccl where there are GPUs, of which each process takes that of its local rank,
    and gloo elsewhere. Processes that are started again after one was killed do not meet the
    addresses that the others had before, as ``init_process_group()`` alone would have it.

    Example:
        >>> import pyro_vae as pv
        >>> with pv.training.group_of_torchrun():
        ...     torch.distributed.is_initialized()
        False
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if on_gpus else "gloo",
        store=dist.PrefixStore(f"pyro_vae attempt {attempt}", store),
        rank=number,
        world_size=count,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the number of this process in its group, 0 without a group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def num_processes() -> int:
    """Return how many processes the group has, 1 without a group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place.

    All tensors of one type and device travel in one message. The sums are the same, to the bit, in
    all processes.

    Args:
        tensors: of the same shapes and types in all processes.
    """
    if num_processes() == 1:
        return
    kinds: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    with torch.no_grad():
        for some in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            flat = flat.to(_device_of_messages(flat))
            dist.all_reduce(flat)
            for tensor, part in zip(some, flat.split([t.numel() for t in some]), strict=True):
                tensor.copy_(part.reshape(tensor.shape))


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Replace a tensor by that of the first process, in place; return it.

    Args:
        tensor: of the same shape and type in all processes.
    """
    if num_processes() > 1:
        with torch.no_grad():
            message = tensor.detach().contiguous().to(_device_of_messages(tensor))
            dist.broadcast(message, 0)
            tensor.copy_(message)
    return tensor


def gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all processes, in their order; shapes and types may differ."""
    return [tensor for (tensor,) in gather_all([tensor])]


def gather_all(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return, for each process, the tensors that it gave: as many as it likes, of any shapes.

    Every process receives all bytes of all others.

    Args:
        tensors: they come back on the device of the first, on the CPU if there is none.

    Raises:
        TypeError: a tensor is of a type that does not travel.
    """
    if num_processes() == 1:
        return [list(tensors)]
    device = tensors[0].device if len(tensors) else torch.device("cpu")
    header, payload = _header(tensors), _bytes(tensors)
    sizes = torch.tensor([header.numel(), payload.numel()])
    sizes = torch.stack(_all_gather(sizes)).cpu()
    headers = _all_gather(_padded(header, int(sizes[:, 0].max())))
    payloads = _all_gather(_padded(payload, int(sizes[:, 1].max())))
    return [
        _tensors(h[:header_size].cpu(), p[:size], device)
        for h, p, (header_size, size) in zip(headers, payloads, sizes.tolist(), strict=True)
    ]


def broadcast_all(tensors: Sequence[Tensor] | None, source: int) -> list[Tensor]:
    """Return the tensors that one process gives, in all processes.

    Args:
        tensors: as many as it likes, of any shapes; not looked at in the other processes. They
            come on the device that messages travel on.
        source: the rank of that process.

    Raises:
        TypeError: a tensor is of a type that does not travel.
    """
    if num_processes() == 1:
        return list(tensors)
    mine = rank() == source
    header = _header(tensors) if mine else None
    payload = _bytes(tensors) if mine else None
    sizes = torch.tensor([header.numel(), payload.numel()] if mine else [0, 0])
    header_size, size = _broadcast(sizes, source).tolist()
    header = _broadcast(header if mine else torch.empty(header_size, dtype=torch.int64), source)
    payload = _broadcast(payload if mine else torch.empty(size, dtype=torch.uint8), source)
    return _tensors(header.cpu(), payload, payload.device)


def interleave(shares: Sequence[Sequence]) -> list:
    """Put together what processes did of a row of things, thing i done by process i mod R.

    A process may have been stopped early: things behind the first that is missing are left out.

    Example:
        >>> interleave([["a", "c", "e"], ["b", "d"]])
        ['a', 'b', 'c', 'd', 'e']
        >>> interleave([["a", "c", "e"], ["b"]])
        ['a', 'b', 'c']
    """
    together, number = [], 0
    while number // len(shares) < len(shares[number % len(shares)]):
        together.append(shares[number % len(shares)][number // len(shares)])
        number += 1
    return together


def _device_of_messages(tensor: Tensor) -> torch.device:
    """Return where the group's backend wants a tensor."""
    backends = dict(part.split(":") for part in dist.get_backend_config().split(","))
    backend = backends.get(tensor.device.type)
    if backend is not None and (backend != "gloo" or tensor.device.type == "cpu"):
        return tensor.device
    if "cpu" in backends:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _all_gather(tensor: Tensor) -> list[Tensor]:
    """Gather tensors of one shape."""
    tensor = tensor.to(_device_of_messages(tensor)).contiguous()
    found = [torch.empty_like(tensor) for _ in range(num_processes())]
    dist.all_gather(found, tensor)
    return found


def _broadcast(tensor: Tensor, source: int) -> Tensor:
    tensor = tensor.to(_device_of_messages(tensor)).contiguous()
    dist.broadcast(tensor, source)
    return tensor


def _header(tensors: Sequence[Tensor]) -> Tensor:
    """Return type, number of dimensions and shape of each tensor, in a row of whole numbers."""
    numbers = []
    for tensor in tensors:
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"tensors of {tensor.dtype} do not travel between processes")
        numbers += [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
    return torch.tensor(numbers, dtype=torch.int64)


def _bytes(tensors: Sequence[Tensor]) -> Tensor:
    """Return the memory of all, on the device of the first."""
    if not tensors:
        return torch.empty(0, dtype=torch.uint8)
    parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat([part.to(tensors[0].device) for part in parts])


def _padded(tensor: Tensor, size: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(size - len(tensor))])


def _tensors(header: Tensor, payload: Tensor, device: torch.device) -> list[Tensor]:
    """Make the tensors again that a header describes."""
    numbers, payload, found = iter(header.tolist()), payload.to(device), []
    for dtype_number in numbers:
        dtype = _DTYPES[dtype_number]
        shape = torch.Size(next(numbers) for _ in range(next(numbers)))
        size = shape.numel() * dtype.itemsize
        # A copy: memory of its own, and aligned.
        found.append(payload[:size].clone().view(dtype).reshape(shape))
        payload = payload[size:]
    return found
