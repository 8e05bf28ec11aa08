"""Text that a server of vLLM says next, and the weights that it says it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bgkernels.labels.errors import ServerError
from bgkernels.labels.served.client import Client, message

DEVELOPED = "start it with VLLM_SERVER_DEV_MODE=1, which opens what changes weights"
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
"""A request that leaves these out gets what the checkpoint's generation_config.json recommends."""


@dataclass(frozen=True)
class Completions:
    """What a model says after a prompt, from vLLM's ``/v1/completions``, in tokens both ways.

    Args:
        client: of the servers.
        model: what requests call it.
    """

    client: Client
    model: str

    def __call__(
        self,
        prompt: Sequence[int],
        length: int,
        seed: int,
        temperature: float = 1.0,
        stop: int | None = None,
    ) -> list[int]:
        """Sampled tokens: ``length`` of them, or fewer, of which the last is ``stop``.

        Args:
            prompt: at least one token.
            length: tokens to say.
            seed: of the sample; in other company a server may round, and so sample, differently.
            temperature: of the sample; 0 takes the most probable token.
            stop: a token that ends a text; None: no token does.

        Raises:
            ServerError: the server cannot give them, or gave others.
        """
        body = {
            "model": self.model, "prompt": list(prompt), "max_tokens": length, "seed": seed,
            "temperature": temperature, **NEUTRAL, "ignore_eos": True,
            "stop_token_ids": [] if stop is None else [stop],
            "return_token_ids": True, "add_special_tokens": False,
        }  # fmt: skip
        answer = self.client.request("POST", "/v1/completions", body)
        if answer.status != 200:
            raise ServerError(
                f"{self.client.name} does not continue {len(prompt)} tokens by {length} "
                f"({message(answer)}); serve the model by: vllm serve MODEL, with room for both"
            )
        try:
            (choice,) = answer.json()["choices"]
            said = [int(token) for token in choice["token_ids"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{self.client.name} answered without the tokens of its text "
                f"({type(error).__name__}: {error}); vLLM sends them since 0.10.2"
            ) from None
        if len(said) != length and (stop is None or len(said) > length or said[-1:] != [stop]):
            raise ServerError(
                f"{self.client.name} said {len(said)} tokens where {length} were asked for; see "
                "the log of the server"
            )
        return said


def reload_weights(client: Client, folder: Path) -> None:
    """Let all servers of a client read other weights of their model, in place.

    Args:
        client: of the servers, which are idle.
        folder: of a checkpoint, as their machines see it.

    Raises:
        ServerError: one refuses, or cannot; vLLM stops where there is no such folder.
    """
    read = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    for server in client.servers:
        for path, body in (("/collective_rpc", read), ("/reset_prefix_cache", None)):
            answer = client.request("POST", path, body, url=server.url, again=False)
            if answer.status != 200:
                remedy = DEVELOPED if answer.status == 404 else (
                    "its machine must see that folder, so let --output be on a disk that both "
                    "share, and start the server anew if it has stopped"
                )  # fmt: skip
                raise ServerError(
                    f"{server.url} did not read the weights in {folder} ({message(answer)}); "
                    f"{remedy}"
                )
