"""DeepSeek-V3 from transformers, decoding from a paged latent cache through tilemla."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from paged_cache import HEAD_DIM_LATENT, HEAD_DIM_ROPE, PAGE_BLOCK_SIZE, PagedLatentCache
from tilemla import flash_mla_with_kvcache, get_mla_metadata

NUM_HEADS_K = 1  # one latent serves all heads


def make_config(
    *,
    num_layers: int = 3,
    num_heads: int = 8,
    hidden_size: int = 512,
    vocab_size: int = 16,
    q_lora_rank: int | None = 256,
    rope_interleave: bool = True,
) -> DeepseekV3Config:
    """Return a small DeepSeek-V3: its latent, rope and head dimensions, YaRN, grouped routing, little of the rest."""
    return DeepseekV3Config(
        kv_lora_rank=HEAD_DIM_LATENT,
        qk_rope_head_dim=HEAD_DIM_ROPE,
        qk_nope_head_dim=128,
        v_head_dim=128,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,  # the scale of the scores depends on it
        },
        max_position_embeddings=163840,
        rope_interleave=rope_interleave,
        q_lora_rank=q_lora_rank,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        intermediate_size=2 * hidden_size,
        first_k_dense_replace=1,
        moe_intermediate_size=hidden_size // 4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        # Where a router finds two experts as good as equal, rounding picks one of them. The real model's 2.5 would make
        # that choice between random experts felt.
        routed_scaling_factor=0.25,
        # Scores of a few units, so that attention picks tokens; 0.02 would average all of them.
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )


def make_model(
    config: DeepseekV3Config, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> DeepseekV3ForCausalLM:
    """Return the library's own model with random weights, its routers in float32 as when it is loaded from a file."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(config).eval().requires_grad_(False).to(device, dtype)
    for layer in model.model.layers[config.first_k_dense_replace :]:
        layer.mlp.gate.float()
    return model


@dataclass(frozen=True)
class Step:
    """What all layers share in one pass through the model.

    Attributes
    ----------
    positions : Tensor, (batch_size, seq_len_q), int64
        Place of each new token in its request.
    slots : Tensor, (batch_size * seq_len_q,), int64
        Place of each new token in a layer's pages.
    block_table : Tensor, (batch_size, max_num_blocks_per_seq), int32
        Pages of each request of the batch.
    cache_seqlens : Tensor, (batch_size,), int32
        Tokens of each request, the new ones included.
    schedule : tuple of Tensor
        What ``get_mla_metadata`` returned: made once, used in every layer.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    block_table: torch.Tensor
    cache_seqlens: torch.Tensor
    schedule: tuple[torch.Tensor, torch.Tensor]


def plan_step(cache: PagedLatentCache, rows: torch.Tensor, positions: torch.Tensor, num_heads: int) -> Step:
    """Plan a pass, on the device and without waiting for it, so that a CUDA graph can hold the plan too.

    Parameters
    ----------
    cache : PagedLatentCache
        Where the batch's requests have their pages.
    rows : Tensor, (batch_size,), int64
        The requests' rows of the cache's block table; ``cache.idle_row`` fills up a batch.
    positions : Tensor, (batch_size, seq_len_q), int64
        Places of the new tokens, successive in each request; -1 in an idle row, which then attends to nothing.
    num_heads : int
        Heads of the model.
    """
    block_table = cache.block_table[rows]
    written = positions.clamp(min=0)
    pages = block_table.gather(1, written // PAGE_BLOCK_SIZE).long()
    cache_seqlens = (positions[:, -1] + 1).int()
    return Step(
        positions=written,
        slots=(pages * PAGE_BLOCK_SIZE + written % PAGE_BLOCK_SIZE).flatten(),
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        schedule=get_mla_metadata(cache_seqlens, positions.shape[1] * num_heads // NUM_HEADS_K, NUM_HEADS_K),
    )


class PagedLatentAttention(nn.Module):
    """The library's attention module, computed in absorbed form from a layer's pages.

    Keys and values are never expanded. With ``kv_b_proj`` cut into a head's key part K and value part V, the score
    ``q_nope . (K latent)`` is ``(K^T q_nope) . latent``, and ``sum p (V latent)`` is ``V (sum p latent)``: queries go
    through K before the decode call, and its output through V after it (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

    Parameters
    ----------
    attention : DeepseekV3Attention
        Whose projections, norms and softmax scale are used, as they are.
    pages : Tensor, (num_blocks, 64, 1, 576)
        The layer's part of the cache.
    """

    def __init__(self, attention: DeepseekV3Attention, pages: torch.Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.pages = pages
        self.rotate = apply_rotary_pos_emb_interleave if attention.config.rope_interleave else apply_rotary_pos_emb
        head_dims = (attention.qk_nope_head_dim, attention.v_head_dim)
        by_head = attention.kv_b_proj.weight.view(attention.num_heads, sum(head_dims), HEAD_DIM_LATENT)
        self.absorb_key, self.absorb_value = by_head.split(head_dims, dim=1)  # (num_heads, 128, 512) each, no copies

    def forward(self, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], step: Step) -> torch.Tensor:
        """Write the new tokens' latents, and attend to all of their requests' tokens up to each.

        Parameters
        ----------
        hidden : Tensor, (batch_size, seq_len_q, hidden_size)
            The normalised input of the layer.
        rope : tuple of Tensor, (batch_size, seq_len_q, 64) each
            Cosines and sines of the tokens' positions.
        step : Step
            The plan of the pass.

        Returns
        -------
        Tensor, (batch_size, seq_len_q, hidden_size)
            What the layer adds to its input.
        """
        attention = self.attention
        q = self._queries(hidden)
        latent, k_rope = attention.kv_a_proj_with_mqa(hidden).split([HEAD_DIM_LATENT, HEAD_DIM_ROPE], dim=-1)
        q_nope, q_rope = q.split([attention.qk_nope_head_dim, HEAD_DIM_ROPE], dim=-1)
        q_rope, k_rope = self.rotate(q_rope, k_rope[:, :, None], *rope, unsqueeze_dim=2)

        token = torch.cat([attention.kv_a_layernorm(latent), k_rope[:, :, 0]], dim=-1)
        self.pages.view(-1, token.shape[-1]).index_copy_(0, step.slots, token.flatten(0, 1))

        q_absorbed = torch.einsum("bshn,hnl->bshl", q_nope, self.absorb_key)
        out, _ = flash_mla_with_kvcache(
            torch.cat([q_absorbed, q_rope], dim=-1),  # (batch_size, seq_len_q, num_heads, 576)
            self.pages,
            step.block_table,
            step.cache_seqlens,
            HEAD_DIM_LATENT,
            *step.schedule,
            softmax_scale=attention.scaling,  # YaRN's part included
            causal=True,
        )
        values = torch.einsum("bshl,hvl->bshv", out, self.absorb_value)
        return attention.o_proj(values.flatten(2))

    def _queries(self, hidden: torch.Tensor) -> torch.Tensor:
        attention = self.attention
        if attention.q_lora_rank is None:
            q = attention.q_proj(hidden)
        else:
            q = attention.q_b_proj(attention.q_a_layernorm(attention.q_a_proj(hidden)))
        return q.unflatten(-1, (attention.num_heads, attention.qk_head_dim))


class PagedDeepseekV3(nn.Module):
    """The library's model with attention from a paged cache; all modules but the attention's inside are its own.

    Parameters
    ----------
    model : DeepseekV3ForCausalLM
        Whose weights are used. It stays as it is, and still runs by itself.
    cache : PagedLatentCache
        Its pages.
    """

    def __init__(self, model: DeepseekV3ForCausalLM, cache: PagedLatentCache) -> None:
        super().__init__()
        self.model, self.cache = model, cache
        self.attention = nn.ModuleList(
            PagedLatentAttention(layer.self_attn, pages)
            for layer, pages in zip(model.model.layers, cache.pages, strict=True)
        )

    def forward(self, tokens: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read new tokens of a batch of requests, and return what may follow the last of each.

        Parameters
        ----------
        tokens : Tensor, (batch_size, seq_len_q), int64
            The tokens: one for each request when decoding, a piece of a prompt when prefilling.
        rows, positions
            As for ``plan_step``.

        Returns
        -------
        logits : Tensor, (batch_size, vocab_size), float32
        """
        decoder = self.model.model
        step = plan_step(self.cache, rows, positions, self.model.config.num_attention_heads)
        hidden = decoder.embed_tokens(tokens)
        rope = decoder.rotary_emb(hidden, step.positions)
        for layer, attention in zip(decoder.layers, self.attention, strict=True):
            hidden = hidden + attention(layer.input_layernorm(hidden), rope, step)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return self.model.lm_head(decoder.norm(hidden[:, -1])).float()
