"""Models that one rank cannot run by itself, and what the reason says."""

from __future__ import annotations

from torch import nn

from dist_export.model.alone import say_sharded


class OfTorchrec(nn.Module):
    """A module with the name that torchrec gives those that exchange rows."""

    __module__ = "torchrec.distributed.embeddingbag"


def test_a_collection_that_torchrec_has_sharded_is_named_with_what_to_do() -> None:
    sparse_arch = nn.ModuleDict({"ebc": OfTorchrec()})
    reason = say_sharded(nn.ModuleDict({"sparse_arch": sparse_arch}), None, ())
    assert "torchrec has sharded sparse_arch.ebc (OfTorchrec)" in reason
    assert "before it is sharded, and a checkpoint that DCP has saved as ckpt_dir" in reason
    assert not say_sharded(nn.ModuleDict({"sparse_arch": nn.ModuleDict({"ebc": nn.Embedding(2, 2)})}), None, ())
