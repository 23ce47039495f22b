"""What the search for tables reads of a model changes nothing in it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from dist_export.model.sparse_tables import find_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = nn.ModuleDict({"user": nn.Embedding(5, 4)})
        self.dense_arch = nn.Sequential(spectral_norm(nn.Linear(4, 3)))


def test_a_weight_that_changes_buffers_when_it_is_read_is_not_read() -> None:
    """In training, each read of it is a step of the power method."""
    model = Model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_weights(model, sparse_model_name="sparse_arch", dense_model_name="dense_arch")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
