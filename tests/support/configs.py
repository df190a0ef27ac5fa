"""Random configurations for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from herdgraph.model.config import HerdConfig, TextConfig


@st.composite
def configs(draw: st.DrawFn) -> HerdConfig:
    """Small decoders of any shape that some split divides."""
    layers, kv, experts = draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([4, 6, 8]))
    flags = st.lists(st.booleans(), min_size=layers, max_size=layers).map(tuple)
    moe = tuple(draw(st.sets(st.integers(0, layers - 1)).map(sorted)))
    chunked = draw(flags)
    return HerdConfig(text=TextConfig(
        vocab_size=draw(st.sampled_from([97, 96 * 4])), hidden_size=16, num_layers=layers,
        num_heads=kv * draw(st.sampled_from([1, 2, 4])), num_kv_heads=kv, head_dim=4,
        expert_size=24 * draw(st.integers(1, 3)), dense_size=48, num_experts=experts,
        top_k=draw(st.integers(1, 2)), moe_layers=moe, rope_layers=draw(flags), chunked_layers=chunked,
        attention_chunk_size=draw(st.integers(1, 40)), tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=1 << 12,
    ))
