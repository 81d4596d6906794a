"""A model's buffers (BatchNorm's running statistics): after each step every rank has rank 0's, as in DDP.

They are outside the law of same bits. Keras keeps them as parameters. Only the buffers of modules that wrote any of
theirs since the last step travel: a causal mask stays where it is. (By module, because torch's batch norm counts a
write to running_mean and none to running_var.)
"""

import torch
from torch import Tensor, nn

from shardstep.collectives import Group
from shardstep.sharding.modules import statistics


class Buffers:
    """The persistent buffers of a model, by the module that owns them."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._model, self._group, self._statistics = model, group, statistics(model)
        kept = model.state_dict(keep_vars=True)
        self.owners: dict[str, list[str]] = {}
        """The names of each owner's buffers."""
        for name, _ in model.named_buffers():
            if name in kept:
                self.owners.setdefault(name.rpartition(".")[0], []).append(name)
        for name in self._statistics:
            self.owners.setdefault(name.rpartition(".")[0], []).append(name)
        self._marked = [True] * len(self.owners)
        self._seen = self._versions()

    def changed(self) -> list[bool]:
        """For each owner, whether this rank has written any of its buffers since it last followed rank 0."""
        return [seen != now for seen, now in zip(self._seen, self._versions(), strict=True)]

    def mark(self, changed: list[bool]) -> None:
        """Which owners' buffers any rank has written, as all ranks agree."""
        self._marked = changed

    def follow_rank_0(self) -> None:
        """Overwrite the marked owners' buffers with rank 0's. Collective."""
        if self._group.size > 1:
            for names, marked in zip(self.owners.values(), self._marked, strict=True):
                for name in names if marked else ():
                    self._broadcast(name, self._tensor(name))
        self._seen = self._versions()

    def _broadcast(self, name: str, buffer: Tensor) -> None:
        raw = buffer.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        self._group.broadcast(raw, label=f"broadcast of buffer {name!r}")
        with torch.no_grad():
            buffer.copy_(raw.view(buffer.dtype).view(buffer.shape))

    def _tensor(self, name: str) -> Tensor:
        return self._statistics[name] if name in self._statistics else self._model.get_buffer(name)

    def _versions(self) -> list[list[tuple[int, int]]]:
        tensors = [[self._tensor(name) for name in names] for names in self.owners.values()]
        return [[(id(tensor), tensor._version) for tensor in owned] for owned in tensors]
