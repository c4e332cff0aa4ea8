"""Where and how torch computes: device, precision, allocator, deterministic kernels, the processes of torchrun."""

import argparse
import ctypes
import os
import platform
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unext.errors import InputError, reason

NATIVE_BF16 = {"amx_bf16", "avx512_bf16"}  # CPU features
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def start(args: argparse.Namespace) -> torch.dtype:
    """Sets up `args.device`, allocator and kernels; silences all processes but the first. Returns the precision."""
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    args.device = resolve(args.device)
    keep_freed_memory(args.device)
    if getattr(args, "deterministic", False):  # an option of train.py
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)  # warns about operations without such a kernel
        if args.device.startswith("cuda"):  # with warn_only, gradients of fused attention still differ between runs
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_mem_efficient_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = precision(args.precision, args.device)
    if getattr(args, "compile", False) and args.device.startswith("cpu") and dtype != torch.float32:  # has produced NaN
        raise InputError("--compile: torch is not reliable in bf16 and fp16 on CPUs; give --precision fp32 as well")
    return dtype


def resolve(name: str) -> str:
    """The device; for "auto" an accelerator (CUDA, MPS, ...) else the CPU; under torchrun the GPU of this process."""
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
        name = name if name == "cuda" or ranks()[2] == 1 else "cpu"  # gloo has no MPS
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{ranks()[1]}"
    try:
        torch.ones(1, device=name).item()
    except Exception as error:  # of another class for each kind of device
        problem = f"torch cannot compute there ({reason(error)})"
        raise InputError(f"--device {name}: {problem}; give cpu, cuda or auto") from error
    return name


def precision(name: str, device: str) -> torch.dtype:
    """fp32, bf16 or fp16; for "auto" bf16 where native (NVIDIA since Ampere, AMX, AVX512-BF16), else fp32."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.startswith("cuda"):
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device == "cpu" and not NATIVE_BF16.isdisjoint(cpu_flags())
    return torch.bfloat16 if native else torch.float32


def cpu_flags() -> set[str]:
    """The features of the CPU by Linux's names; empty on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def keep_freed_memory(device: str) -> None:
    """On the CPU, makes glibc keep the memory of large freed arrays for the next ones (mallopt(3)).

    By default glibc returns every array above 32 MB to the system, which has to clear the pages of the next one.
    """
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def ranks() -> tuple[int, int, int]:
    """From torchrun: this process's rank, its rank on this machine, the number of processes; else (0, 0, 1)."""
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    variables |= {name: os.environ[name] for name in (*variables, "MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    rank, local_rank, processes = (int(number) if number.isdecimal() else -1 for number in list(variables.values())[:3])
    if not 0 <= rank < processes or local_rank < 0 or (processes > 1 and len(variables) < 5):
        settings = " ".join(f"{name}={value}" for name, value in variables.items())  # a scheduler's, perhaps
        remedy = "start several processes with torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE"
        raise InputError(f"the environment is not torchrun's ({settings}): {remedy}")
    return rank, local_rank, processes


def compile_module(module: nn.Module) -> None:
    """Compiles a module in place: one graph for each shape of its input, made when the first such input comes.

    On CUDA, its forward and its backward pass become CUDA graphs, each of which a single call launches; their results
    are valid until the next call only.
    """
    # By default torch cuts the graph of a distributed module where gradients are exchanged, and fails at checkpoints.
    torch._dynamo.config.optimize_ddp = False
    on_gpu = next(module.parameters()).is_cuda
    module.compile(fullgraph=True, dynamic=False, mode="reduce-overhead" if on_gpu else None)
    print("compiling: the first batch takes a minute or two")


def prepare(module: nn.Module, device: str, compiled: bool, sync_bn: bool) -> nn.Module:
    """The module as training calls it: compiled if asked, and wrapped if torchrun started several processes."""
    if compiled:
        compile_module(module)
    if ranks()[2] == 1:
        return module
    if gpu := device.startswith("cuda"):
        torch.cuda.set_device(device)  # where NCCL gathers objects
    # The other processes wait here for the first, which opens all files.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(minutes=30))
    if sync_bn:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)  # in place
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if gpu else None)


def wait_for_all() -> None:
    """Waits until all processes that torchrun started call this."""
    if ranks()[2] > 1:
        dist.init_process_group("gloo")
        dist.barrier()
        end()


def end() -> None:
    """Destroys the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def reduce_all(values: Tensor, operation: str = "SUM") -> Tensor:
    """Reduces the values over all processes, in place; `operation` is a name in torch.distributed.ReduceOp."""
    if dist.is_initialized():
        dist.all_reduce(values, getattr(dist.ReduceOp, operation))
    return values


def share_buffers(model: nn.Module) -> None:
    """Copies the first process's buffers to all: each has updated BatchNorm's statistics with other images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def gather_all(items: list) -> list:
    """The items of all processes, concatenated."""
    if not dist.is_initialized():
        return items
    gathered: list[list] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for items in gathered for item in items]
