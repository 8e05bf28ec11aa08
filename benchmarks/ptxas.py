"""What each CUDA kernel takes of a multiprocessor, and how soon it loads a row.

``python -m benchmarks.ptxas`` compiles ``csrc/cuda`` with ``nvcc`` (no GPU is needed), looks at the
machine code with the ``cuobjdump`` of Triton's package, and writes
``benchmarks/results/ptxas/sm_*.json``; with ``--sources`` it renews some files' kernels alone. It
fails if a kernel spills.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ptxas"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# As CMakeLists.txt says.
FLAGS = ["-std=c++17", "-O3", "--prec-div=false", "--ftz=true", "-DBGK_TARGET=cuda", "-Icsrc"]
REGISTERS, LARGEST = 65536, 2048
"""Of a multiprocessor: registers, and threads that it holds at most."""
THREADS = 256  # kThreads in csrc/cuda/threads.cuh

ENTRY = re.compile(r"Compiling entry function '(\S+)'(.*?)Used (\d+) registers([^\n]*)", re.S)
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def compiled(source: Path, architecture: str) -> list[dict[str, Any]]:
    """One row a kernel of a file."""
    command = ["nvcc", *FLAGS, f"-arch={architecture}", "-Xptxas", "-v", "-cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        command += [str(source.relative_to(ROOT)), "-o", cubin.name]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        code = machine_code(cubin.name)
    rows = []
    for name, before, registers, rest in ENTRY.findall(run.stderr):
        stack, stores, loads = map(int, SPILLS.findall(before)[-1])
        shared = re.search(r"(\d+) bytes smem", rest)
        blocks = REGISTERS // (-(-int(registers) // 8) * 8 * THREADS)
        rows.append({
            "kernel": demangled(name), "registers": int(registers),
            "shared": int(shared[1]) if shared else 0, "stack": stack, "spilled": stores + loads,
            "threads a multiprocessor": min(LARGEST, blocks * THREADS), **code[demangled(name)],
        })  # fmt: skip
    return rows


def machine_code(cubin: str) -> dict[str, dict[str, int]]:
    """Instructions of each kernel, those before its first load of logits, and generic loads.

    Labels and numbers of a row are loads of 64 bits. Instructions are counted in the order of the
    text: a branch may leave some out.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found = {}
    for name, body in re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", text, re.S):
        operations = INSTRUCTION.findall(body)
        loads = (i for i, x in enumerate(operations) if x.startswith("LDG") and ".64" not in x)
        found[demangled(name)] = {
            "instructions": len(operations),
            "before logits": next(loads, 0),
            "generic loads": sum(x == "LD" or x.startswith("LD.") for x in operations),
        }
    return found


def demangled(name: str) -> str:
    """``absorb_kernel<Half, 1, true>`` of a mangled name."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    found = re.search(r"(\w+_kernel)(<.*?>)?\(", text)
    if found is None:
        return text
    return found[1] + re.sub(r"bgk::cuda::|\((?:bgk::cuda::)?\w+\)", "", found[2] or "")


def renewed(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table, those of the kernels that were compiled again replaced."""
    again = {row["kernel"].partition("<")[0] for row in new}
    kept = [row for row in old if row["kernel"].partition("<")[0] not in again]
    return sorted(kept + new, key=lambda row: row["kernel"])


def table(rows: list[dict[str, Any]]) -> str:
    """For people."""
    columns = [c for c in rows[0] if c != "kernel"]
    lines = [f"{'':36} " + "  ".join(columns)]
    for row in rows:
        numbers = "  ".join(str(row[c]).rjust(len(c)) for c in columns)
        lines.append(f"{row['kernel']:36} {numbers}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ptxas", description=__doc__)
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES)
    parser.add_argument("--sources", nargs="*", default=[], help="as vjp.cu; default: all")
    options = parser.parse_args()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", version)
    spilled = []
    RESULTS.mkdir(parents=True, exist_ok=True)
    for architecture in options.architectures:
        path = RESULTS / f"{architecture}.json"
        every = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
        sources = [s for s in every if not options.sources or s.name in options.sources]
        old = json.loads(path.read_text())["kernels"] if options.sources and path.exists() else []
        rows = renewed(old, [r for s in sources for r in compiled(s, architecture)])
        print(f"{architecture}\n{table(rows)}", flush=True)
        made = {"nvcc": release[1] if release else version, "kernels": rows}
        path.write_text(json.dumps(made, indent=1) + "\n")
        spilled += [f"{architecture} {r['kernel']}" for r in rows if r["spilled"]]
    if spilled:
        sys.exit(f"these spill: {', '.join(spilled)}")


if __name__ == "__main__":
    main()
