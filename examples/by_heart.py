"""Random weights whose greedy tokens are no accident: the last layer learns answers by heart.

Logits of a random model lie close together: in one place of a hundred the best leads by less than rounding to bfloat16
moves it. Two correct implementations then part ways, and comparing tokens is a matter of luck. Here every weight is
random but the last matrix, which is solved for (ridge regression): at each place of each answer, the token that follows
shall score 1 and every other token 0. The best logit then leads by 0.5 or more, while rounding moves logits by about
0.02 in bfloat16 and 0.003 in float16, or a few times that where it makes a router choose another expert.

That the answers depend on attention is up to the vocabulary: of 16 tokens, each is followed by many others, and only
the tokens before it tell by which. Without YaRN's factor in the softmax scale, one token in three is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekV3ForCausalLM

# Of the mean square of a state. Less, and the matrix follows rounding; more, and it does not reach 1 and 0.
_RIDGE = 0.001
# A matrix that is just large enough for what it learns would be all edges.
_WIDTH_PER_TOKEN = 4


@dataclass(frozen=True)
class Text:
    """A prompt, and the answer that the model shall know."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def make_texts(lengths: Sequence[tuple[int, int]], *, vocab_size: int = 16, seed: int = 0) -> list[Text]:
    """Return random texts with the given lengths of prompt and answer."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for prompt, answer in lengths:
        tokens = tuple(torch.randint(vocab_size, (prompt + answer,), generator=generator).tolist())
        texts.append(Text(tokens[:prompt], tokens[prompt:]))
    return texts


def needed_hidden_size(texts: Sequence[Text]) -> int:
    """Return the least hidden size of a model that can learn the answers."""
    return _WIDTH_PER_TOKEN * sum(len(text.answer) for text in texts)


@torch.inference_mode()
def learn_by_heart(model: DeepseekV3ForCausalLM, texts: Sequence[Text]) -> None:
    """Solve for ``lm_head`` such that the model answers each prompt with its text.

    Raises
    ------
    ValueError
        When there is more to learn than a model of this hidden size can.
    """
    needed = needed_hidden_size(texts)
    if needed > model.config.hidden_size:
        hidden_size, tokens = model.config.hidden_size, needed // _WIDTH_PER_TOKEN
        raise ValueError(
            f"answers must have up to {hidden_size // _WIDTH_PER_TOKEN} tokens in all for a hidden_size of "
            f"{hidden_size}, got {tokens}; take a hidden_size of {needed} or more"
        )
    reference = copy.deepcopy(model).float()
    states = torch.cat([_read(reference.model, text).last_hidden_state[0, _answered(text)] for text in texts]).double()
    targets = torch.cat([torch.tensor(text.answer, device=model.device) for text in texts])
    one_hot = torch.nn.functional.one_hot(targets, model.config.vocab_size).double()
    gram = states @ states.T
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    model.lm_head.weight.copy_(torch.linalg.solve(gram + ridge, one_hot).T @ states)


@torch.inference_mode()
def answer_logits(model: DeepseekV3ForCausalLM, text: Text) -> torch.Tensor:
    """Return the logits, (answer, vocab_size), with which the library's model itself answers, as float32."""
    return _read(model, text).logits[0, _answered(text)].float()


def _answered(text: Text) -> slice:
    """Return the places whose next token belongs to the answer."""
    return slice(len(text.prompt) - 1, len(text.prompt) + len(text.answer) - 1)


def _read(model: torch.nn.Module, text: Text) -> Any:
    device = next(model.parameters()).device
    return model(torch.tensor([text.prompt + text.answer], device=device), use_cache=False)
