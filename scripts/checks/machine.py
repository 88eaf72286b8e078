"""Versions of the packages, the devices, whether torch can compile here, and the rates of matrix products."""

import platform
import re
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from scripts.checks import Section
from training.planning.dry_run import GIB, size
from training.planning.gpus import gpu_named
from training.processes.precision import measure

ROOT = Path(__file__).resolve().parents[2]
PINNED, OPTIONAL = ("torch", "transformers", "accelerate"), ("triton", "flash-attn-4", "xformers")
CUDNN = "nvidia-cudnn-frontend"
HOPPER = (9, 0)  # compute capability from which its attention is much faster than that of torch
CPU_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")  # as the kernel of Linux names them
LITTLE = 4 * GIB  # bytes of free memory


def versions(device: torch.device) -> Section:
    """Packages that are installed, beside those of requirements.txt."""
    section = Section("Versions")
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    installed = {name: _version(name) for name in (*PINNED, *OPTIONAL, CUDNN)}
    facts = {"Python": platform.python_version(), "CUDA of torch": torch.version.cuda}
    for name, here in (facts | {"cuDNN of torch": torch.backends.cudnn.version()} | installed).items():
        section.rows.append({"package": name, "installed": here, "requirements.txt": pins.get(name, "")})
    for name in PINNED:
        if (here := installed[name] or "missing").split("+")[0] != pins[name]:
            remedy = "go on if the checks below are well; else pip install -r requirements.txt"
            section.problem(f"{name} is {here}, but requirements.txt has {pins[name]}", remedy)
    if device.type == "cuda" and not installed["triton"]:
        section.problem("triton is missing, so nothing can be compiled for the GPU", "pip install triton")
    if device.type == "cuda" and not installed[CUDNN] and torch.cuda.get_device_capability() >= HOPPER:
        what = f"{CUDNN} is missing, and with it the fastest attention for this GPU"
        section.problem(what, "pip install -r requirements-gpu.txt")
    return section


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def devices(device: torch.device) -> Section:
    """The CPU and each GPU; and whether torch can use the GPU that a driver was installed for."""
    section, memory, file = Section("Devices"), psutil.virtual_memory(), Path("/proc/cpuinfo")
    cpu = file.read_text() if file.exists() else ""
    name = re.search(r"^model name\s*: (.+)$", cpu, re.MULTILINE)
    sets = [s for s in CPU_SETS if re.search(rf"^(flags|Features)\b.*\s{s}\b", cpu, re.MULTILINE)]
    about = f"{torch.get_num_threads()} threads, {' '.join(sets)}"
    _add_device(section, name[1] if name else platform.machine(), about, memory.available, memory.total)
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        about = f"compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
        _add_device(section, f"GPU {i}: {gpu.name}", about, *torch.cuda.mem_get_info(i))
    if not torch.cuda.is_available() and (shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists()):
        what = "the build for CPUs" if torch.version.cuda is None else f"the build for CUDA {torch.version.cuda}"
        remedy = "pytorch.org/get-started has the build for your driver, which nvidia-smi shows"
        section.problem(f"there is an NVIDIA driver, but torch, {what}, can't use a GPU", remedy)
    return section


def _add_device(section: Section, name: str, about: str, free: int, total: int) -> None:
    section.rows.append({"device": name, "what it has": about, "free memory": f"{size(free)} of {size(total)}"})
    if free < LITTLE:
        remedy = "end other programs (see nvidia-smi and top), or set training.micro_batch_tokens lower"
        section.problem(f"{name} has only {size(free)} of free memory", remedy)


def compiler(device: torch.device) -> Section:
    """Compile a small function for the device."""
    x, began = torch.ones(64, device=device, requires_grad=True), time.perf_counter()
    torch.compile(lambda x: (x.sin() * 2).sum())(x).backward()
    return Section("Compiler", [{"what": "torch.compile of a small function", "seconds": time.perf_counter() - began}])


def matmul(device: torch.device) -> Section:
    """The rates of matrix products, and what `training.precision: auto` chooses."""
    machine = measure(device)
    rates, choice = {name: machine.rate(name) for name in ("fp32", "bf16")}, machine.choose("auto")
    row = {name: f"{rate / 1e9:,.0f} GFLOP/s" for name, rate in rates.items()} | {"training.precision: auto": choice}
    section = Section("Matrix products", [row])
    if choice == "fp32":
        remedy = "leave training.precision at auto; a GPU or a CPU with AMX would train faster"
        section.problem("bf16 is not clearly faster than fp32 on this machine", remedy)
    gpu = gpu_named(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if gpu and rates["bf16"] < gpu.bf16_flops / 2:
        remedy = "nvidia-smi -q -d PERFORMANCE says what slows the GPU; end other programs on it"
        section.problem(f"bf16 products reach only {rates['bf16'] / gpu.bf16_flops:.0%} of the {gpu.source}", remedy)
    return section
