"""The CUDA backends: Q stays in the GPU's memory, vectors and results come and go through pinned host memory."""

import importlib.util
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sliplm.errors import SlipError
from sliplm.field import HALF, P
from sliplm.kernels.base import IntMatrix

TILE = 128  # Q is padded with zeros to multiples of this: the kernels need no masks, and `torch._int_mm` no care
_PASS = 1 << 23  # numbers that go to or come from the GPU at a time: bounds every buffer, whatever the prompt

_streams = threading.local()  # one a thread; torch lends them from a pool of 32, so memory does not grow with threads


class CudaMatrix(IntMatrix):
    """Q on the GPU, multiplied by `torch._int_mm`: for GPUs that Triton does not serve.

    Args:
        q: (M, K).
        device: where Q lives; "cpu" runs the same arithmetic without a GPU, for tests.

    Raises SlipError if Q does not fit into the GPU's memory.
    """

    def __init__(self, q: NDArray[np.int8], device: str = "cuda") -> None:
        self.rows, self.cols = q.shape
        padded = np.pad(q, [(0, -self.rows % TILE), (0, -self.cols % TILE)])
        try:
            self._q = torch.from_numpy(padded).to(device)
        except torch.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info()
            raise SlipError(
                f"the model's matrices do not fit into the GPU's memory: {free >> 20} of {total >> 20} MiB are free, "
                f"and the next matrix takes {padded.nbytes >> 20}. Use a larger GPU, or the CPU: SLIPLM_BACKEND=native."
            ) from None
        self.nbytes = padded.nbytes

    def product(
        self, x: NDArray[np.uint32], *, out: NDArray[np.uint32] | None = None, threads: int = 0
    ) -> NDArray[np.uint32]:
        """As `IntMatrix.product`, for any 32-bit values. `threads` means nothing to a GPU.

        Raises MemoryError if the GPU has no room for the vectors, SlipError if it fails.
        """
        out = self._check(x, out)
        step = max(1, _PASS // max(self._q.shape))
        try:
            with torch.cuda.stream(_stream(self._q.device)):
                for start in range(0, len(x), step):
                    self._pass(x[start : start + step], out[start : start + step])
        except torch.OutOfMemoryError:
            raise MemoryError("the GPU ran out of memory") from None
        except RuntimeError as error:
            reason, _, _ = str(error).partition("\n")
            raise SlipError(f"the GPU failed: {reason}") from None
        return out

    def _pass(self, x: NDArray[np.uint32], out: NDArray[np.uint32]) -> None:
        device = self._q.device
        pin = device.type == "cuda"  # torch keeps pinned memory for reuse
        sent = torch.empty((len(x), self._q.shape[1]), dtype=torch.int32, pin_memory=pin)
        sent.numpy()[:, : self.cols] = x.view(np.int32)
        sent.numpy()[:, self.cols :] = 0
        y = self._multiply(sent.to(device, non_blocking=True))
        received = torch.empty(y.shape, dtype=torch.int32, pin_memory=pin).copy_(y, non_blocking=True)
        if pin:
            torch.cuda.current_stream(device).synchronize()
        out[...] = received.numpy()[:, : self.rows].view(np.uint32)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Q x_t mod p on the padded Q (M, K): x (T, K) int32, the bits of any uint32, to (T, M) int32, canonical.

        With balanced digits: see `triton_kernel`.
        """
        z = (x.to(torch.int64) & 0xFFFFFFFF) % P
        z -= P * (z > HALF)
        digits = (
            ((z + 0x80808080) ^ 0x80808080).view(torch.int8).view(*x.shape, 8)[..., :4]
        )  # the low bytes of an int64
        count = 4 * len(x)
        operand = digits.new_zeros((count + -count % 32, x.shape[1]))  # more than 16 rows, a multiple of 8
        operand[:count].view(4, *x.shape).copy_(digits.permute(2, 0, 1))
        parts = torch._int_mm(operand, self._q.T)[:count].view(4, len(x), -1).to(torch.int64)
        total = parts[0] + (parts[1] << 8) + (parts[2] << 16) + (parts[3] << 24)
        return (total % P).to(torch.int32)

    @staticmethod
    def available() -> bool:
        return torch.cuda.is_available()

    @staticmethod
    def describe() -> str:
        return f"cuda (torch._int_mm on {torch.cuda.get_device_name()})"


class TritonMatrix(CudaMatrix):
    """Q on the GPU, multiplied by our own kernel."""

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        from sliplm.kernels import triton_kernel  # Triton need not be installed

        return triton_kernel.product(self._q, x)

    @staticmethod
    def available() -> bool:
        """Below compute capability 8.0 Triton has no int8 dot product, and says so at length."""
        return (
            CudaMatrix.available()
            and torch.cuda.get_device_capability() >= (8, 0)
            and importlib.util.find_spec("triton") is not None
        )

    @staticmethod
    def describe() -> str:
        return f"triton ({torch.cuda.get_device_name()})"


def _stream(device: torch.device) -> Any:
    """This thread's stream on `device`; None, which changes nothing, without a GPU."""
    if device.type != "cuda":
        return None
    own = _streams.__dict__
    if str(device) not in own:
        own[str(device)] = torch.cuda.Stream(device)
    return own[str(device)]
