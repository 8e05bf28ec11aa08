"""A run whose teacher is behind a server learns what it learns from the teacher loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

pytest.importorskip("urllib3", reason="needs the extra `served`: urllib3")

from bgkernels.training import DemoConfig, ModelShape, models, run_demo
from bgkernels.training.cli import app
from bgkernels.training.tokens import train_tokenizer
from tests.stand_in import StandIn
from tests.training.notes import write_notes
