"""Where the Triton backend is tested: on the GPU, or in Triton's interpreter on the CPU.

Import this before anything imports triton: the interpreter is chosen when functions are decorated.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"


def prepare() -> None:
    """Make the interpreter round like a device, and several times faster.

    It truncates fp32 to bf16, where devices round to nearest. And at every call of a small function
    it swaps the members of ``triton.language`` for its own once more, which takes most of its time;
    the launch of the kernel has done that already.
    """
    if "ttsem" in sys.modules:  # a device of which there is no driver to ask
        torch.cuda.is_current_stream_capturing = lambda: False
    if DEVICE.type != "cpu":
        return
    import triton.language as tl
    from triton.runtime import interpreter

    if hasattr(interpreter, "truncating"):
        return
    interpreter.truncating = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.truncating(data, source, target, rounding)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    interpreter._convert_float = convert
    interpreter._patch_lang(tl.standard.sum.fn)  # `tl.core`, for which no launch cares
    interpreter.InterpretedFunction.__call__ = call
