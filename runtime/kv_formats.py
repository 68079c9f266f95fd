"""Byte layouts of FP8 caches, as FlashMLA defines them. Standard library only."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fp8Layout:
    """Where the parts of a cached token lie: e4m3 values in tiles, a scale for each tile, and a bfloat16 rope part.

    Parameters
    ----------
    head_dim_nope : int
        Elements that are quantised.
    head_dim_rope : int
        Elements that follow them and are kept in bfloat16.
    tile : int
        Elements that share a scale.
    scale_bytes : int
        Bytes of a token's scales, what pads them included.
    scales_apart : bool
        Whether a page holds the scales of its tokens after all that its tokens hold else. Otherwise they lie between
        each token's quantised elements and its rope part.
    page_alignment_bytes : int
        What the bytes from one page to the next are a multiple of.
    """

    head_dim_nope: int
    head_dim_rope: int
    tile: int
    scale_bytes: int
    scales_apart: bool
    page_alignment_bytes: int = 1

    @property
    def head_dim(self) -> int:
        """Elements of a token."""
        return self.head_dim_nope + self.head_dim_rope

    @property
    def num_tiles(self) -> int:
        """Scales of a token."""
        return self.head_dim_nope // self.tile

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token, scales included."""
        return self.head_dim_nope + 2 * self.head_dim_rope + self.scale_bytes

    @property
    def bytes_apart(self) -> int:
        """Bytes from one token of a page to the next: those of its scales are not among them where they lie apart."""
        return self.bytes_per_token - (self.scale_bytes if self.scales_apart else 0)

    def bytes_per_page(self, page_block_size: int) -> int:
        """Bytes from one page to the next."""
        num_bytes = page_block_size * self.bytes_per_token
        return -(-num_bytes // self.page_alignment_bytes) * self.page_alignment_bytes


# By what FlashMLA, vLLM and SGLang call them: the bytes of a token.
FP8_LAYOUTS = {
    # DeepSeek-V3.2: 512 e4m3, four float32 scales that are powers of two, 64 bfloat16 (tests/quant.py, V32_FP8Sparse).
    "fp8_656": Fp8Layout(512, 64, tile=128, scale_bytes=16, scales_apart=False),
    # 448 e4m3 and 64 bfloat16 of each token, then seven e8m0 scales and a pad of each (MODEL1_FP8Sparse).
    "fp8_584": Fp8Layout(448, 64, tile=64, scale_bytes=8, scales_apart=True, page_alignment_bytes=576),
}
