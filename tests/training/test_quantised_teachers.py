"""A teacher whose weights need a package says which."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from bgkernels.integrations.causal_lm import attach
from bgkernels.integrations.heads import HeadError
from bgkernels.training.errors import ModelError
from bgkernels.training.models import load_pretrained
from tests.models import tiny, tokenizer

KINDS = {
    "gptq": ("optimum", {"bits": 4, "group_size": 8}),
    "awq": ("gptqmodel", {"bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}),
    "bitsandbytes": ("bitsandbytes", {"load_in_4bit": True}),
    "compressed-tensors": (
        "compressed_tensors", {"format": "pack-quantized", "config_groups": {}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_missing_package_is_named(tmp_path, kind):
    package, settings = KINDS[kind]
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    tiny().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps(config | {"quantization_config": {"quant_method": kind, **settings}})
    )
    said = rf"needs a package that is not installed: .*{package.replace('_', '.')}"
    with pytest.raises(ModelError, match=f"--teacher .*{said}") as caught:
        load_pretrained(str(tmp_path), "--teacher", 8)
    assert "\n" not in str(caught.value)
    with pytest.raises(HeadError, match=f"`teacher` .*{said}"):
        attach(tiny(), str(tmp_path))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(HeadError, match=r"`teacher` .* could not be loaded"):
        attach(tiny(), tmp_path)
