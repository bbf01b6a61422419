"""Distinct prefixes of prompts, and a forward over them: each is computed once, without padding.

A block is called as it is, on a batch's prefixes as one sequence `[1, new, d_model]`. Attention
alone relates tokens, and transformers lets it be replaced (its `AttentionInterface`): ours gathers,
for each row, the keys of its whole path and the queries of its new end.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from lunar_tune.models.layout import decoder_slice
from lunar_tune.models.loading import LoadedModel


class PrefixTree:
    """Token sequences, one a row, and the numbers of their distinct prefixes, the nodes."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = tuple(map(tuple, sequences))
        self.lengths, self.n_rows = tuple(map(len, self.sequences)), len(self.sequences)
        self.offsets = (0, *accumulate(self.lengths))
        """Where each row begins among all tokens, and their number."""
        numbers: dict[tuple[int, int], int] = {}
        nodes: list[int] = []
        first: list[bool] = []
        for sequence in self.sequences:
            node = -1
            for token in sequence:
                new = len(numbers)
                node = numbers.setdefault((node, token), new)
                nodes.append(node)
                first.append(node == new)
        self.n_nodes = len(numbers)
        self.nodes: Int[Tensor, " tokens"] = torch.tensor(nodes, dtype=torch.int64)
        """The node of each token, row after row."""
        self.first: Bool[Tensor, " tokens"] = torch.tensor(first, dtype=torch.bool)
        """Whether a token is the first one with its node."""
        ids = [token for _, token in numbers]
        self.ids: Int[Tensor, " nodes"] = torch.tensor(ids, dtype=torch.int64)
        """The token that each prefix ends with."""

    def token_index(
        self, rows: Sequence[int], lengths: Sequence[int] | None = None
    ) -> Int[Tensor, " tokens_of_rows"]:
        """Return where the first `lengths` tokens of some rows, or all, stand among all tokens."""
        if lengths is None:
            lengths = [self.lengths[row] for row in rows]
        starts = [self.offsets[row] for row in rows]
        pieces = [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
        return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.int64)

    def nodes_of(
        self, rows: Sequence[int], lengths: Sequence[int] | None = None
    ) -> Int[Tensor, " tokens_of_rows"]:
        """Return the nodes of some rows' tokens, row after row; see `token_index`."""
        return self.nodes[self.token_index(rows, lengths)]


class KeyValues:
    """Attention keys and values `[*shape, kv_heads, head_dim]` of some blocks, by node or slot."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def put(
        self, layer: int, places: tuple[Int[Tensor, " new"], ...], keys: Tensor, values: Tensor
    ) -> None:
        """Write a block's keys and values `[new, kv_heads, head_dim]` at some places."""
        for kept, new in ((self.keys, keys), (self.values, values)):
            if layer not in kept:
                # Zeros: what is masked is still multiplied by 0, and 0 times garbage may be NaN.
                kept[layer] = new.new_zeros((*self.shape, *new.shape[-2:]))
            kept[layer][places] = new


@dataclass(frozen=True, slots=True)
class TreeBatch:
    """The new prefixes of some rows, and where their keys stand; tensors on the device."""

    nodes: Int[Tensor, " new"]
    ids: Int[Tensor, "1 new"]
    positions: Int[Tensor, "1 new"]
    asked: Int[Tensor, " asked"]  # places in `nodes` whose final stream is wanted
    path: Int[Tensor, "rows length"]
    """Nodes of each row from its first token; node 0 beyond its end."""
    places: Int[Tensor, "rows most"]
    """Each row's places in `nodes`, which look at those before them; 0 beyond a row's last."""
    is_query: Bool[Tensor, "rows most"]  # where `places` are, row after row those from 0 on
    mask: Bool[Tensor, "rows 1 most length"]


def arrange(
    tree: PrefixTree,
    rows: Sequence[int],
    *,
    budget: int,
    device: torch.device,
    lengths: Sequence[int] | None = None,
    done: Collection[int] = (),
    asked: Collection[int] = (),
) -> list[TreeBatch]:
    """Arrange the prefixes of some rows in batches of at most `budget` new ones, or of one row.

    Of each row `lengths` tokens are taken, or all; nodes that are `done` are computed already, and
    of those that are `asked` the final stream is wanted.
    """
    known = set(done)
    lengths = [tree.lengths[row] for row in rows] if lengths is None else lengths
    batches: list[list[tuple[int, list[int]]]] = [[]]
    size = 0
    for row, length in sorted(
        zip(rows, lengths, strict=True), key=lambda part: tree.sequences[part[0]][: part[1]]
    ):
        path = tree.nodes[tree.offsets[row] : tree.offsets[row] + length].tolist()
        low = next((i for i, node in enumerate(path) if node not in known), length)
        known.update(path[low:])
        new = length - low
        if not new:
            continue
        if batches[-1] and size + new > budget:
            batches.append([])
            size = 0
        batches[-1].append((low, path))
        size += new
    return [_batch(tree, parts, asked, device) for parts in batches if parts]


def _batch(
    tree: PrefixTree,
    parts: Sequence[tuple[int, list[int]]],
    asked: Collection[int],
    device: torch.device,
) -> TreeBatch:
    """Return a batch of rows, each as its first new place and its path."""
    path = pad_sequence([torch.tensor(path) for _, path in parts], batch_first=True).to(device)
    new = [node for low, path in parts for node in path[low:]]
    counts = torch.tensor([len(path) - low for low, path in parts], device=device)
    positions = torch.cat([torch.arange(low, len(path)) for low, path in parts]).to(device)
    places = torch.arange(int(counts.max()), device=device)
    is_query = places < counts[:, None]
    places = (places + (counts.cumsum(0) - counts)[:, None]).where(is_query, 0)
    wanted = [place for place, node in enumerate(new) if node in asked]
    return TreeBatch(
        nodes=torch.tensor(new, device=device),
        ids=tree.ids[new][None].to(device),
        positions=positions[None],
        asked=torch.tensor(wanted, dtype=torch.int64, device=device),
        path=path,
        places=places,
        is_query=is_query,
        mask=torch.arange(path.shape[1], device=device) <= positions[places][:, None, :, None],
    )


@torch.inference_mode()
def tree_forward(
    loaded: LoadedModel,
    batch: TreeBatch,
    start: int,
    stream: Float[Tensor, "nodes d_model"] | None,
    keys: KeyValues,
    *,
    stop: int | None = None,
) -> Float[Tensor, "asked d_model"]:
    """Run blocks `start` to `stop` − 1 on a batch; return the stream after the final norm.

    `stream` is the residual stream at the input of `start`, None computes it from the tokens. Of
    these blocks the batch's keys and values are written, those of its ancestors are there. `start`
    may be n_layers, which runs none; without `stop` all blocks from there on are run.
    """
    given = {"input_ids": batch.ids}
    if stream is not None:
        given = {"inputs_embeds": stream.index_select(0, batch.nodes)[None]}
    with (
        decoder_slice(loaded.model, loaded.layout, start, stop or loaded.n_layers) as decoder,
        _along_paths(loaded, decoder.config, batch, keys),
    ):
        output = decoder(**given, position_ids=batch.positions, use_cache=False)
    hidden: Tensor = output.last_hidden_state[0, batch.asked]
    return hidden


# What `_attend` works on: a batch, and the keys so far.
_current: ContextVar[tuple[TreeBatch, KeyValues]] = ContextVar("lunar_tune_tree")
_NAME = "lunar_tune_tree"


@contextmanager
def _along_paths(
    loaded: LoadedModel, config: Any, batch: TreeBatch, keys: KeyValues
) -> Iterator[None]:
    """Inside, attention follows a batch's paths, and the last MLP works where it is asked for."""
    from transformers import AttentionInterface

    def at_asked(_mlp: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0][:, batch.asked]

    def spread(_mlp: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Give zeros elsewhere, where nobody reads them."""
        whole = output.new_zeros(1, len(batch.nodes), output.shape[-1])
        whole[:, batch.asked] = output
        return whole

    AttentionInterface.register(_NAME, _attend)
    with ExitStack() as stack:
        stack.callback(_current.reset, _current.set((batch, keys)))
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = _NAME
        if loaded.n_layers:  # of the part that is run
            mlp = loaded.layout.mlp_of(loaded.model, -1)
            stack.callback(mlp.register_forward_pre_hook(at_asked).remove)
            stack.callback(mlp.register_forward_hook(spread).remove)
        yield


def _attend(  # noqa: PLR0917 as transformers calls it
    module: nn.Module,
    query: Float[Tensor, "1 heads new head_dim"],
    key: Float[Tensor, "1 kv_heads new head_dim"],
    value: Float[Tensor, "1 kv_heads new head_dim"],
    attention_mask: Tensor | None,  # noqa: ARG001 the paths say what is seen
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 new heads head_dim"], None]:
    """Attend along the paths: an attention function as transformers calls it.

    Query heads that share a key head are put side by side, so that nothing is repeated.
    """
    batch, kept = _current.get()
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    kept.put(layer, (batch.nodes,), key[0].transpose(0, 1), value[0].transpose(0, 1))
    kv_heads, head_dim = key.shape[1], key.shape[3]
    repeats = query.shape[1] // kv_heads
    rows, most = batch.places.shape
    q = _rows_at(query[0].transpose(0, 1), batch.places)
    q = q.unflatten(2, (kv_heads, repeats)).permute(0, 2, 1, 3, 4).flatten(2, 3)
    attended = scaled_dot_product_attention(
        q,
        _rows_at(kept.keys[layer], batch.path).transpose(1, 2),
        _rows_at(kept.values[layer], batch.path).transpose(1, 2),
        attn_mask=batch.mask.repeat_interleave(repeats, dim=2),
        scale=scaling,
    )
    by_head = attended.reshape(rows, kv_heads, most, repeats, head_dim).permute(0, 2, 1, 3, 4)
    return by_head.flatten(2, 3)[batch.is_query][None], None


def _rows_at(table: Tensor, places: Int[Tensor, "rows length"]) -> Tensor:
    """Return `table[places]`; on a CPU in a fifth of that expression's time."""
    rows: Tensor = table.index_select(0, places.flatten())
    return rows.reshape(*places.shape, *table.shape[1:])
