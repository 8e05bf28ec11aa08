"""Triton kernels compiled ahead of time, without a device: nothing spills, and loads are wide.

``python -m tests.backends.test_triton_compile sm_90`` prints what each kernel of it uses.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bgkernels.backends import triton as host
from bgkernels.backends.triton.launch import Launch, launch_of
from bgkernels.rows.extras import Mixture, Tempered, Tilt, TotalVariation
from bgkernels.rows.spec import Cap, RowSpec

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
ALL_FOR = "sm_90"
V = 4096


@dataclass(frozen=True)
class Variant:
    """What decides over the code of a kernel.

    Args:
        kernel: absorb, merge, reread, add, finalize, fold or vjp.
        spec: of the rows.
        dtypes: of student, teacher and gradient.
        teacher: whether there is one.
        split: whether several programs share a row.
        aligned: whether rows start on 16 bytes.
        number: type of run-time numbers: fp64 is what some tracing compilers pass.
        everywhere: compiled for every architecture, not for one alone.
        coded: whether the tile is kept in codes.
    """

    name: str
    kernel: str
    spec: RowSpec
    dtypes: tuple[str, str, str] = ("fp32", "fp32", "bf16")
    teacher: bool = True
    split: bool = False
    aligned: bool = True
    number: str = "fp32"
    everywhere: bool = False
    coded: bool = False


CODED = ("fp32", "fp32", "bf16")
BF16, FP32, FP16 = ("bf16",) * 3, ("fp32",) * 3, ("fp16", "fp32", "fp16")
ENTROPY, AT_ONE = (Tilt(0, 0.1),), (Tilt(0, 0.1), Tempered())
ALPHA_BETA = (Tilt(0.7, 0.2), Tilt(0, 0.9), Tilt(0.9, 0))
MOMENTS = (Tilt(0, 0, True), Tilt(-0.3, 0.3))
PAIRS = (Mixture(0.5), Mixture(0.1), TotalVariation())
EVERY_KIND = (*AT_ONE, *MOMENTS, *PAIRS)
CAPS = {"student": Cap(1.5, 30.0), "teacher": Cap(1.0, 30.0)}
SHARED, TEMPERED = RowSpec(V, V), RowSpec(V, V, 2.0)


def spec(**kwargs: Any) -> RowSpec:
    return RowSpec(V, V, **kwargs)


VARIANTS = (
    Variant("unaligned", "absorb", SHARED, BF16, aligned=False),
    Variant("entropy", "absorb", spec(extras=ENTROPY), BF16),
    Variant("entropy, T", "absorb", spec(temperature=2.0, extras=AT_ONE), BF16, everywhere=True),
    Variant("smoothing, fp64 numbers", "absorb", spec(temperature=2.0, logit_sum=True), FP16,
            number="fp64"),
    Variant("argmax, split", "absorb", spec(label_rule="argmax"), BF16, split=True),
    Variant("sample, T", "absorb", spec(temperature=2.0, label_rule="sample", extras=AT_ONE), BF16),
    Variant("alpha-beta, T", "absorb", spec(temperature=2.0, extras=AT_ONE + ALPHA_BETA),
            everywhere=True),
    Variant("every kind", "absorb", spec(extras=EVERY_KIND)),
    Variant("capped, T", "absorb", spec(temperature=2.0, extras=AT_ONE, **CAPS), BF16),
    Variant("coded, entropy", "absorb", spec(extras=ENTROPY), CODED, everywhere=True, coded=True),
    Variant("coded, T", "absorb", spec(temperature=2.0, extras=AT_ONE), CODED, coded=True),
    Variant("cross-entropy", "absorb", RowSpec(V, 0, logit_sum=True), BF16, teacher=False),
    Variant("sample, every kind", "merge", spec(label_rule="sample", extras=EVERY_KIND)),
    Variant("jsd", "reread", spec(extras=(Mixture(0.5),)), BF16, everywhere=True),
    Variant("all, capped, split", "reread", spec(temperature=2.0, extras=PAIRS, **CAPS),
            split=True),
    Variant("coded jsd", "reread", spec(extras=(Mixture(0.5),)), CODED, coded=True),
    Variant("all", "add", spec(extras=EVERY_KIND)),
    Variant("cross-entropy", "finalize", RowSpec(V, 0), teacher=False),
    Variant("every kind", "finalize", spec(temperature=2.0, extras=EVERY_KIND), everywhere=True),
    Variant("plain", "fold", SHARED),
    Variant("every kind", "fold", spec(temperature=2.0, extras=EVERY_KIND), everywhere=True),
    Variant("plain", "vjp", SHARED, BF16),
    Variant("T, fp64 numbers", "vjp", spec(temperature=2.0, extras=AT_ONE), FP32, number="fp64"),
    Variant("alpha-beta, T", "vjp", spec(temperature=2.0, extras=AT_ONE + ALPHA_BETA)),
    Variant("every kind, capped", "vjp", spec(temperature=2.0, extras=EVERY_KIND, **CAPS),
            everywhere=True),
    Variant("coded", "vjp", spec(extras=ENTROPY), CODED, everywhere=True, coded=True),
    Variant("coded, T", "vjp", spec(temperature=2.0, extras=AT_ONE), CODED, coded=True),
    Variant("cross-entropy", "vjp", RowSpec(V, 0, logit_sum=True), BF16, teacher=False),
)  # fmt: skip
COLUMN_KERNELS = ("absorb", "reread", "vjp")
DOUBLES = ("lse_s_ptr", "lse_t_ptr", "statistics_ptr", "grads_ptr", "coefficients_ptr")


def signature(kernel: Any, v: Variant, constants: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Types of the arguments of a kernel, and which of them are multiples of 16."""
    student, teacher, gradient = v.dtypes
    pointers = dict.fromkeys(DOUBLES, "fp64") | {"s_ptr": student, "t_ptr": teacher}
    pointers["out_ptr"] = gradient if v.kernel == "vjp" else "fp64"
    pair = (v.number, v.number)
    groups = dict.fromkeys(("s_cap", "t_cap", "inv_t"), pair)
    groups["parameters"] = ((pair,) * 3,) * len(v.spec.extras)
    types, multiples, unspecialised = {}, {}, kernel.do_not_specialize
    for i, name in enumerate(kernel.arg_names):
        aligned = v.aligned
        if name in constants:
            types[name], aligned = "constexpr", False
        elif name in groups:
            types[name], aligned = groups[name], False
        elif name.endswith("_ptr"):
            integers = name.removesuffix("_ptr").endswith(("ints", "labels"))
            word = "i32" if v.coded and name == "code_ptr" else "fp32"
            types[name] = "*" + ("i64" if integers else pointers.get(name, word))
        else:
            types[name] = "i32"
        if aligned and name not in unspecialised:
            multiples[(i,)] = [["tt.divisibility", 16]]
    return types, multiples


def compiled(v: Variant, architecture: str) -> dict[str, Any]:
    """Compile a variant; what it uses, as the assembler says."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(host.kernel_module(), f"{v.kernel}_kernel")
    constants = host.constants(
        v.kernel, v.spec, not v.split, teacher=v.teacher, code=1024 * v.coded
    )
    launch = launch_of(v.kernel, v.spec, v.coded)
    if v.kernel not in COLUMN_KERNELS:
        launch = Launch(host.ROWS["BLOCK"], host.ROWS["num_warps"], fill=0)
    constants["BLOCK"] = launch.block
    if v.kernel in ("absorb", "reread"):
        constants["LANES"] = launch.lanes
    types, multiples = signature(kernel, v, constants)
    source = ASTSource(kernel, types, constexprs=constants, attrs=multiples)
    kind, number = re.fullmatch(r"(sm_|gfx)(\w+)", architecture).groups()  # type: ignore[union-attr]
    cuda = kind == "sm_"
    target = GPUTarget("cuda", int(number), 32) if cuda else GPUTarget("hip", architecture, 64)
    made = triton.compile(source, target=target, options=launch.options(cuda))
    used = {"shared": made.metadata.shared, **(cuda_usage if cuda else hip_usage)(made.asm)}
    return {"name": f"{v.kernel}: {v.name}", "dtypes": " ".join(v.dtypes), **used}


def cuda_usage(asm: dict[str, Any]) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        said, code = (
            subprocess.run(
                [tool, way, file.name], capture_output=True, text=True, check=True
            ).stdout
            for way in ("-res-usage", "-sass")
        )
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    wide = len(re.findall(r"ld\.global\S*\.v4", asm["ptx"]))
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "wide loads": wide,
        "exchanges": exchanges(code),
    }


def exchanges(code: str) -> int:
    """Most shuffles of a loop, from its first instruction to the branch that goes back to it."""
    operations = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    places = [(int(at, 16), operation) for at, operation in operations]
    loops = [
        (int(target[1], 16), at)
        for at, operation in places
        if (target := re.search(r"\bBRA\b.* 0x([0-9a-f]+)", operation)) and int(target[1], 16) < at
    ]
    counts = (
        sum(first <= at <= last and "SHFL" in operation for at, operation in places)
        for first, last in loops
    )
    return max(counts, default=0)


def hip_usage(asm: dict[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def of(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", text)[-1])

    return {
        "registers": of("vgpr_count"),
        "spilled": of("vgpr_spill_count"),  # scalars spill to vector registers, not to memory
        "wide loads": len(re.findall(r"(global|buffer)_load_dwordx4", text)),
    }


def variants(architecture: str) -> list[Variant]:
    return [v for v in VARIANTS if v.everywhere or architecture == ALL_FOR]


@pytest.fixture(scope="module")
def usage() -> dict[str, list[dict[str, Any]]]:
    """What every variant uses, from other processes: in this one the kernels may be interpreted."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.backends.test_triton_compile"]
    halves = ([ALL_FOR], [name for name in ARCHITECTURES if name != ALL_FOR])
    started = [
        subprocess.Popen([*command, *names], env=environment, stdout=subprocess.PIPE, text=True)
        for names in halves
    ]
    rows: dict[str, list[dict[str, Any]]] = {architecture: [] for architecture in ARCHITECTURES}
    for process in started:
        said, _ = process.communicate()
        assert process.returncode == 0  # its error is printed
        for row in map(json.loads, said.splitlines()):
            rows[row.pop("architecture")].append(row)
    return rows


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_variant_spills(architecture: str, usage: dict[str, list[dict[str, Any]]]) -> None:
    rows = usage[architecture]
    print("\n".join(table(architecture, rows)))
    for v, row in zip(variants(architecture), rows, strict=True):
        assert row["spilled"] == 0, row
        assert row["shared"] <= 4096, row
        if v.kernel in COLUMN_KERNELS and v.aligned:
            assert row["wide loads"], row


def test_a_block_exchanges_maxima_alone(usage: dict[str, list[dict[str, Any]]]) -> None:
    """Six shuffles for each of a few maxima, and a column; sums are added up at a row's end."""
    found = {row["name"]: row["exchanges"] for row in usage[ALL_FOR]}
    counts = [n for name, n in found.items() if name.startswith("absorb")]
    assert len(counts) > 9 and all(0 < n <= 36 for n in counts), found
    assert not any(n for name, n in found.items() if name.startswith(("reread", "vjp"))), found


def table(architecture: str, rows: list[dict[str, Any]]) -> list[str]:
    columns = ("registers", "spilled", "shared", "wide loads")
    lines = [f"{architecture:42} {'dtypes':15} " + " ".join(f"{c:>10}" for c in columns)]
    for row in rows:
        numbers = " ".join(f"{row[c]:10}" for c in columns)
        lines.append(f"{row['name']:42} {row['dtypes']:15} {numbers}")
    return lines


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for variant in variants(name):
            row = {"architecture": name, **compiled(variant, name)}
            print(json.dumps(row), flush=True)
