"""Step 4: the device: which one computes, in which precision, with which of PyTorch's switches; and what the CPU is."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from torchrelay.device import portable, private
from torchrelay.errors import RelayError, UsageError
from torchrelay.run.pins import PINS
from torchrelay.settings import Settings

_NO_AUTOCAST = nullcontext()
Precision = Literal["float32", "bf16", "fp16", "auto"]
Auto = Literal["auto"]
_NO_MEMORY = re.compile(r"out of memory|(can't|cannot|unable to) allocate|not enough memory|bad_alloc", re.IGNORECASE)
_MOST_THREADS = 4096


class DeviceSettings(Settings):
    """Which device computes, and how."""

    name: str = "auto"
    """auto (cuda if there is one, else mps, else cpu), cpu, cuda, cuda:1 or mps."""
    precision: Precision = "float32"
    """float32; bf16 or fp16 by autocast with float32 weights (fp16 with loss scaling); auto: what is faster here."""
    threads: Annotated[int, Field(ge=1)] | Auto | None = None
    """CPU threads per operation; unset: PyTorch's default. It changes bits, so it belongs to the run's identity."""
    channels_last: bool | Auto = False
    """Keep images as (height, width, channels) in memory: faster convolutions in bf16 and fp16; or "auto"."""
    compile: bool = False
    """Compile the model with torch.compile: a slower start, faster steps on a GPU."""
    graph: bool = False
    """Record a training step as a CUDA graph and replay it: small networks no longer wait for Python."""
    tf32: bool = False
    """Let a CUDA device round float32 products to 10 bits of mantissa: faster, less exact."""
    benchmark: bool = False
    """Let cuDNN choose kernels by timing them: faster, but the bits vary (needs run.exact=false)."""


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Return nested dicts, lists and tuples with a function of each tensor in them, or whatever else has a `to`."""
    if isinstance(value, Mapping):
        return {key: mapped(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [mapped(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return function(value) if hasattr(value, "to") else value


@dataclass(frozen=True)
class Device:
    """A device that is set up, as `set_up` returns it."""

    device: torch.device
    settings: DeviceSettings
    """Those that were "auto" have their defaults until they are decided."""
    portable: bool = False
    """Whether its bits are those of every processor."""
    undecided: tuple[str, ...] = ()
    """The settings that were "auto"."""

    def decided(self, choice: Mapping[str, Any]) -> "Device":
        """Return this device with settings that were "auto"."""
        left = tuple(name for name in self.undecided if name not in choice)
        return replace(self, settings=self.settings.model_copy(update=dict(choice)), undecided=left)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that autocast computes in."""
        return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.settings.precision]

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass in this device's precision."""
        if self.settings.precision == "float32":
            return _NO_AUTOCAST
        return torch.autocast(self.device.type, dtype=self.dtype)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device, in its memory format."""
        if self.settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.to(self.device)

    def move(self, value: Any) -> Any:
        """Move a tensor, or the tensors of a tuple, list or dict, to the device; on CUDA without waiting."""
        if isinstance(value, Tensor) and value.is_cpu and self.device.type == "cpu":
            return value

        def moved(item: Any) -> Any:
            # MPS may read memory that was freed in the meantime. A graph or a packed sequence moves its own tensors.
            return item.to(self.device, non_blocking=True) if self.device.type == "cuda" else item.to(self.device)

        return mapped(moved, value)

    def arrange(self, inputs: Any) -> Any:
        """Return inputs of shape (batch, channels, height, width) in the model's memory format, others unchanged."""
        if self.settings.channels_last and isinstance(inputs, Tensor) and inputs.ndim == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler that fp16 needs; with other precisions it is disabled."""
        return torch.amp.GradScaler(self.device.type, enabled=self.settings.precision == "fp16")

    def keep_threads(self, threads: int) -> bool:
        """Compute with the number of threads that a run started with, unless the settings or portable bits say it.

        Returns:
            Whether that changed the number.

        Raises:
            ValueError: no machine has so many.
        """
        if self.portable or self.settings.threads is not None or threads == torch.get_num_threads():
            return False
        if not 0 < threads <= _MOST_THREADS:
            raise ValueError(f"{threads} threads")
        torch.set_num_threads(threads)
        return True

    @contextmanager
    def explain_errors(self, batch_size: int) -> Iterator[None]:
        """Say what to do if the device runs out of memory, or if a GPU meets an index out of range.

        Raises:
            RelayError: in place of PyTorch's error.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            text = str(error)
            if "device-side assert" in text:  # a GPU reports it late, and doesn't say where
                raise RelayError(
                    f"{self.device} met an index out of range, most likely a label that the model has no output for: "
                    "run with device.name=cpu, which names the sample"
                ) from error
            if not isinstance(error, MemoryError) and not _NO_MEMORY.search(text):
                raise
            wanted = re.search(r"tried to allocate ([\d.,]+ ?\w+)", text, re.IGNORECASE)
            raise RelayError(
                f"{self.device} has no memory left{f' (it tried to get {wanted[1]})' if wanted else ''} at batches of "
                f"{batch_size}: lower data.batch_size, raise parallel.replicas to process a batch in more parts, or "
                "choose a smaller model or device.precision=bf16"
            ) from error

    def without_graph(self) -> "Device":
        """Return this device for steps that aren't recorded as CUDA graphs."""
        return replace(self, settings=self.settings.model_copy(update={"graph": False}))

    def describe(self) -> str:
        """Return a line for the log."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        details: list[str] = [self.settings.precision]
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            details.append(f"{threads} thread{'s' if threads > 1 else ''}")
        details += [f"portable (arithmetic {portable.arithmetic()})"] * self.portable
        details += ["channels last"] * bool(self.settings.channels_last) + ["compiled"] * self.settings.compile
        return f"{name}, {', '.join(details)}"


def set_up(settings: DeviceSettings, exact: bool, *, is_portable: bool | None = False) -> Device:
    """Choose the device and set PyTorch's switches for it, each one explicitly, and the number of threads.

    Args:
        settings: which device, and how it computes.
        exact: whether only deterministic kernels may run.
        is_portable: whether the bits must be those of every processor.

    Raises:
        UsageError: this machine has no such device, or the device doesn't support the settings.
    """
    device = torch.device(_choose("cpu" if is_portable and settings.name == "auto" else settings.name))
    undecided = tuple(name for name in ("precision", "channels_last", "threads") if getattr(settings, name) == "auto")
    settings = settings.model_copy(update={name: getattr(DeviceSettings(), name) for name in undecided})
    if is_portable:  # its bits follow no clock: what is "auto" has its default
        undecided = ()
        _check_portable(settings, device, exact)
        torch.set_num_threads(1)
    if settings.precision == "fp16" and device.type == "cpu":
        raise UsageError("device.precision 'fp16' isn't for the CPU: use 'bf16' or 'float32'")
    if exact and settings.benchmark:
        raise UsageError("device.benchmark gives other bits each time: leave it off, or --set run.exact=false")
    if settings.compile and device.type == "cpu" and not _has_compiler():
        raise UsageError(
            "device.compile needs a C++ compiler, and there is neither g++ nor one that CXX names: install one (on "
            "Debian: apt install g++), or leave device.compile out"
        )
    if device.type == "cpu":
        private.keep_freed_memory()
    if isinstance(settings.threads, int):
        torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    torch.backends.cudnn.allow_tf32 = settings.tf32
    torch.backends.cudnn.benchmark = settings.benchmark
    if exact and device.type == "cuda":
        # cuBLAS reads this when it creates its first handle; without it PyTorch refuses its deterministic mode.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    private.use_deterministic_algorithms(exact, settings.compile)
    # It would help to find reads of uninitialized memory, and costs memory traffic at each allocation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Device(device, settings, bool(is_portable), undecided)


def _check_portable(settings: DeviceSettings, device: torch.device, exact: bool) -> None:
    """Refuse settings by which the bits depend on the machine.

    Raises:
        UsageError: naming the first one.
    """
    wrong = {
        "run.exact=true": not exact,
        "device.name=cpu": device.type != "cpu",
        "device.precision=float32": settings.precision != "float32",
        "device.compile=false": settings.compile,
        "device.threads=1 (more cores are used by --devices)": settings.threads not in (None, 1),
    }
    if found := next((remedy for remedy, is_wrong in wrong.items() if is_wrong), None):
        raise UsageError(f"run.portable can't hold with these settings: set {found}, or leave run.portable out")
    portable.check_pins()
    portable.replace_roots()


def _has_compiler() -> bool:
    return os.name == "nt" or shutil.which(os.environ.get("CXX", "g++")) is not None


def _choose(name: str) -> str:
    """Return the name of an available device.

    Raises:
        UsageError: there is no such device.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # one of several processes
        # SLURM may hide the other tasks' devices from each task.
        only_own = torch.cuda.device_count() == 1 and "SLURM_LOCALID" in os.environ
        name = f"cuda:{0 if only_own else os.environ['LOCAL_RANK']}"
    elif name == "cuda" and has_cuda and dist.is_available() and dist.is_initialized():  # by the caller's own script
        name = f"cuda:{dist.get_rank() % torch.cuda.device_count()}"
    kind, _, number = name.partition(":")
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]+)?", name):
        raise UsageError(f"device.name '{name}' is unknown: use auto, cpu, cuda, cuda:1 or mps")
    if kind == "cuda" and (not has_cuda or int(number or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise UsageError(f"device.name is '{name}', but PyTorch sees {count} CUDA devices here: use auto or cpu")
    if kind == "mps" and not has_mps:
        raise UsageError("device.name is 'mps', but this machine has none: use auto or cpu")
    return name


# ------------------------------------------------------------------------------------------------ the processor

# Besides the width of vectors, PyTorch's libraries choose kernels by these.
_UNITS = ("avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def processor_name() -> str:
    """Return the CPU's model name."""
    return str(_capabilities().get("cpu_name") or platform.machine())


def instructions() -> str:
    """Return the vector instructions that PyTorch uses, and the CPU's units for half precision."""
    units = [unit for unit in _UNITS if _capabilities().get(unit)]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *units])


def has_amx() -> bool:
    """Return whether this CPU multiplies bf16 matrices in tiles."""
    return bool(_capabilities().get("amx_bf16"))


def has_only_avx2() -> bool:
    """Return whether this CPU has AVX2 and not AVX-512, or a portable run keeps oneDNN from using that."""
    is_pinned = os.environ.get("ONEDNN_MAX_CPU_ISA") == PINS["ONEDNN_MAX_CPU_ISA"]
    return bool(_capabilities().get("avx2")) and (is_pinned or not _capabilities().get("avx512_f"))


def identity_of(device: torch.device, *, is_portable: bool = False) -> dict[str, str | int | bool]:
    """Return what decides the last bits of a result on this machine; in a portable run that isn't its processor."""
    facts: dict[str, str | int | bool] = {}
    if is_portable:
        return {
            "torch": torch.__version__,
            "device": device.type,
            "pins": " ".join(f"{name}={value}" for name, value in PINS.items()),
            "arithmetic": portable.arithmetic(),
            "c_library": portable.c_library(),
            "threads": torch.get_num_threads(),
        }
    if device.type == "cuda":
        facts["cudnn"] = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({processor_name()})"
    return facts | {
        "torch": torch.__version__,
        "device": kind,
        "instructions": instructions(),
        "threads": torch.get_num_threads(),
    }


@cache
def _capabilities() -> dict[str, Any]:
    """Return PyTorch's description of the CPU; an older PyTorch has none."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return capabilities
