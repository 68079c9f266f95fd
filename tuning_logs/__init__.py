"""Measurements as data: one JSONL file per kernel and GPU, and the configurations chosen from them."""
