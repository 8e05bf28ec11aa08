"""Text from a server: it writes in place of one of the two models of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bgkernels.integrations.served import check
from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.api import LogProbabilities, ServedModel, find_model
from bgkernels.labels.served.client import Client
from bgkernels.labels.served.completions import Completions, reload_weights
from bgkernels.training import ranks
from bgkernels.training.config import DemoConfig
from bgkernels.training.errors import ModelError, OptionError
from bgkernels.training.methods import METHODS, Role, find
from bgkernels.training.models import CausalLM, save
from bgkernels.training.sampling import row_seeds
from bgkernels.training.sharding import whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ATTEMPTS = 100
"""Requests for one text: one more for each token beyond the vocabulary that all models have."""


@dataclass(frozen=True)
class TextServer:
    """A server of a model of the run, and a :class:`~bgkernels.training.generation.Speaker`.

    A teacher is served as it is. A student learns, so before each step that learns from the
    student's text its weights are saved, and the server reads them.

    Args:
        source: of the text.
        role: whose text it is.
        folder: of the student's weights, which the server's machine sees too.
    """

    source: Completions
    role: Role
    folder: Path

    def __call__(
        self,
        model: CausalLM,
        prompts: Tensor,
        length: int,
        vocab: int,
        seed: int | list[int],
        *,
        lengths: Tensor | None = None,
        temperature: float = 1.0,
        stop: int | None = None,
    ) -> Tensor:
        """As :func:`~bgkernels.training.generation.generate`, with random numbers of the server's.

        Raises:
            ServerError: the server does not answer, or with something else than such text.
        """
        rows, longest = prompts.shape
        seeds = row_seeds(seed, rows) if isinstance(seed, int) else seed
        given = [longest] * rows if lengths is None else lengths.tolist()

        def say(row: tuple[list[int], int, int]) -> list[int]:
            text, count, first = row
            said = self._say(text[:count], length, vocab, first, temperature, stop)
            return said + [stop or 0] * (length - len(said))

        texts = zip(prompts.tolist(), given, seeds, strict=True)
        said = [*self.source.client.in_order(say, texts)]
        return torch.tensor(said, dtype=torch.int64, device=model.device).view(rows, length)

    def _say(
        self, prompt: list[int], length: int, vocab: int, seed: int, temperature: float,
        stop: int | None,
    ) -> list[int]:  # fmt: skip
        """A sample of the leading columns alone, although the server samples from all.

        From a token beyond them on, it is asked again, by other random numbers.
        """
        said: list[int] = []
        for number in row_seeds(seed, ATTEMPTS):
            new = self.source(prompt + said, length - len(said), number, temperature, stop)
            said += takewhile(lambda token: token < vocab, new)
            if len(said) == length or (stop is not None and said[-1:] == [stop]):
                return said
        raise ServerError(
            f"{self.source.client.name} too often says tokens from number {vocab} on, which not "
            "all models of this run have; use models of one vocabulary"
        )

    def update(self, model: CausalLM) -> None:
        """Let the server read the present weights of the student; every process must ask at once.

        Raises:
            ServerError: it cannot, or is another model all the same.
        """
        save(model, self.folder)
        ranks.meet()
        if ranks.first():
            reload_weights(self.source.client, self.folder.resolve())
        ranks.meet()
        self.check(model)

    def check(self, model: CausalLM) -> None:
        """Refuse a server whose log-probabilities are not those of a model.

        Raises:
            ServerError: they are not.
        """
        client, tokens = self.source.client, [token % model.vocab for token in check.NUMBERS]
        text = torch.tensor([tokens], device=model.device)

        @torch.no_grad()
        def read() -> Tensor:
            return model.leading(model.vocab)(model.hidden(text)[0]).float().log_softmax(-1)

        source = LogProbabilities(client, self.source.model, check.K)
        nats = check.distance(whole([model], read), tokens, source)
        if nats > check.NATS:
            raise ServerError(
                f"the log-probabilities of {client.name} are {nats:.2f} nats a token away from "
                f"those of the {self.role}, so it serves another model, or at another temperature; "
                f"serve the checkpoint that --{self.role} names"
            )


def open_server(
    config: DemoConfig,
    models: Mapping[str, CausalLM],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
) -> TextServer:
    """The server that ``config.generate_with`` names, of the model whose name it tells.

    Args:
        config: of the run.
        models: that were loaded, by option.
        tokenizers: likewise.

    Raises:
        OptionError: no method of the run learns from that model's text, or by LoRA.
        ModelError: sequences are too long for the server.
        ServerError: it cannot be asked, or serves neither model.
    """
    assert config.generate_with is not None
    client = Client(config.generate_with)
    served = find_model(client)
    role = _role(config, client, served)
    if not any(find(method).written_by(role) for method in config.methods):
        names = ", ".join(name for name, method in METHODS.items() if method.written_by(role))
        raise OptionError(
            f"--generate-with serves the {role}, whose text no method of this run learns from "
            f"({', '.join(config.methods)}); choose one that does: {names}"
        )
    if role == "student" and config.lora:
        raise OptionError(
            "--lora trains an adapter, and --generate-with gives the server of a student whole "
            "weights; leave one of them out"
        )
    length = config.data.sequence_length
    if served.limit is not None and length > served.limit:
        raise ModelError(
            f"{client.name} takes at most {served.limit} tokens of a text; lower the length, now "
            f"{length}, or start it with a larger --max-model-len"
        )
    check.compare_tokens(client, served, tokenizers[f"--{role}"])
    server = TextServer(Completions(client, served.name), role, config.output / "served")
    if role == "teacher":
        server.check(models["--teacher"])
    return server


def _role(config: DemoConfig, client: Client, served: ServedModel) -> Role:
    """Whose text a server writes, by the name of the checkpoint that it has loaded."""
    names: dict[Role, str | None] = {"teacher": config.teacher, "student": config.student}
    found = [role for role, name in names.items() if name and check.alike(served.root, name)]
    if len(found) == 2:
        place = Path(served.root).resolve()
        found = [role for role in found if Path(str(names[role])).resolve() == place]
    if len(found) != 1 or served.sglang:
        said = "SGLang" if served.sglang else served.root or "a model of no name"
        raise ServerError(
            f"--generate-with takes text of --teacher {config.teacher} or --student "
            f"{config.student} from vLLM, and {client.name} serves {said}; start it as: vllm serve "
            "MODEL, by the name of one of them"
        )
    return found[0]
