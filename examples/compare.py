"""Compare what was served with the library's own model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DeepseekV3ForCausalLM

from by_heart import Text, answer_logits


@dataclass(frozen=True)
class Comparison:
    """How served answers compare with the library's.

    Attributes
    ----------
    different : tuple of int
        Requests whose tokens are not those of greedy ``generate``: eager attention, the library's own cache, the same
        weights and dtype.
    smallest_lead : float
        The least by which the best logit leads the second, with eager attention in float32.
    largest_shift : float
        The most by which a served logit differs from the one in float32. A lead of more than twice this can't be lost.
    median_shift : float
        The largest of a token's logits, the median of all tokens: where no router was of two minds.
    library_median_shift : float
        The same of the library's eager attention in the model's dtype.
    """

    different: tuple[int, ...]
    smallest_lead: float
    largest_shift: float
    median_shift: float
    library_median_shift: float


@torch.inference_mode()
def compare_with_library(
    model: DeepseekV3ForCausalLM,
    texts: Sequence[Text],
    answers: Sequence[Sequence[int]],
    logits: Sequence[torch.Tensor],
) -> Comparison:
    """Answer the prompts with the library's model, and compare.

    Parameters
    ----------
    model : DeepseekV3ForCausalLM
        Which has learnt the texts.
    texts : sequence of Text
        Prompts with the answers that were learnt.
    answers : sequence of sequence of int
        The tokens that were served.
    logits : sequence of Tensor, (answer, vocab_size), float32
        The logits that they were the best of.
    """
    reference = copy.deepcopy(model).float()
    different: list[int] = []
    leads, shifts, library_shifts = [], [], []
    for index, (text, answer, served) in enumerate(zip(texts, answers, logits, strict=True)):
        prompt = torch.tensor([text.prompt], device=model.device)
        generated = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(text.answer), do_sample=False
        )[0, len(text.prompt) :]
        if list(answer) != generated.tolist():
            different.append(index)
        expected = answer_logits(reference, text)
        best, second = expected.topk(2).values.unbind(-1)
        leads.append(best - second)
        shifts.append((served - expected).abs().amax(-1))
        library_shifts.append((answer_logits(model, text) - expected).abs().amax(-1))
    return Comparison(
        tuple(different),
        float(torch.cat(leads).min()),
        float(torch.cat(shifts).max()),
        float(torch.cat(shifts).median()),
        float(torch.cat(library_shifts).median()),
    )
