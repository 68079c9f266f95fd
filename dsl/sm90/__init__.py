"""Tile programs for sm_90a: TMA, wgmma, warpgroups with roles."""
