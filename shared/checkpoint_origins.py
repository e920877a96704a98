# SPDX-License-Identifier: Apache-2.0
"""Where each weight of one of our networks lies in a published state dict."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from shared.checkpoints import check_fit


@dataclass(frozen=True)
class Origin:
    """A published tensor, or one of the equal parts into which its rows divide.

    Attributes:
        key: published key.
        part: which part, from 0.
        parts: into how many; 2 for mean and log-variance in one convolution, 3 for query, key and value.
        heads: 1 where the parts follow one another. The attention of the published U-Nets (`QKVAttentionLegacy`)
            divides the rows into heads first and each head into its parts; then the number of heads.
    """

    key: str
    part: int = 0
    parts: int = 1
    heads: int = 1

    @property
    def name(self) -> str:
        """For messages."""
        return self.key if self.parts == 1 else f"{self.key}[{self.part + 1}/{self.parts}]"

    def take(self, published: Tensor, like: Tensor) -> Tensor:
        """The part as the network wants it: a 1x1 convolution becomes the matrix of a linear layer, or the reverse.

        What does not fit is returned as it is, for the comparison of shapes to name.
        """
        groups = self.heads * self.parts
        if published.ndim == 0 or published.shape[0] % groups:
            return published
        rows = published.unflatten(0, (self.heads, self.parts, -1))[:, self.part].flatten(0, 1)
        kernel = rows.shape[2:] if rows.ndim > like.ndim else like.shape[2:] if rows.ndim < like.ndim else ()
        pointwise = rows.ndim > 1 and like.ndim > 1 and all(size == 1 for size in kernel)
        return rows.reshape(like.shape) if pointwise and rows.shape[:2] == like.shape[:2] else rows


Table = Mapping[str, Origin]
"""Key of our network -> its origin."""


def convert_by_table(source: Mapping[str, Tensor], network: nn.Module, table: Table) -> dict[str, Tensor]:
    """A published state dict as one of `network`, strictly: nothing is missing, nothing left over.

    Args:
        source: published tensors of this network alone; not changed.
        network: only names, shapes and data types of its state dict are read; it may live on the meta device.
        table: the origin of every key of `network`.

    Returns:
        A state dict for `network.load_state_dict(..., strict=True)`: same keys and order, in the data type of the
        network.

    Raises:
        ValueError: what does not fit, by its published name; or a table that does not fit the network.
    """
    kind = type(network).__name__
    target = network.state_dict()
    unknown = sorted(set(target) ^ set(table))
    if unknown:
        raise ValueError(
            f"{kind}: expected a network that the published layout knows, but {unknown[0]} is not in it. "
            "Remedy: leave options away that published networks do not have, e.g. cross_attention_dim"
        )
    wanted = {origin.name: like for origin, like in ((table[key], like) for key, like in target.items())}
    parts: dict[str, list[int]] = defaultdict(list)
    found: dict[str, Tensor] = {}
    for key, like in target.items():
        origin = table[key]
        parts[origin.key].append(origin.part)
        if origin.key in source:
            found[origin.name] = origin.take(source[origin.key], like)
    uneven = [o.key for o in table.values() if sorted(parts[o.key]) != list(range(o.parts))]
    if uneven:
        raise ValueError(f"{kind}: expected a table that uses each part of {uneven[0]} once")
    found |= {key: value for key, value in source.items() if key not in parts}
    check_fit(kind, found, wanted)
    return {key: found[table[key].name].detach().to(like.dtype).contiguous() for key, like in target.items()}
