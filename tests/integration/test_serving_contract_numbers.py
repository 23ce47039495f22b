"""What the contract takes for ids, and for which lists it holds: it states nothing that no made-up batch could show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_export.errors import UserError
from tests.integration.test_score_program import one_table, run
from tests.integration.test_serving_contract import assert_same_inputs, dense_inputs, known_inputs
from tests.support import score_models as models

# ---- where numbers come from, and lists of all lengths ----


def with_lengths(lengths: list[int], ids_below: int = models.ROWS) -> models.Batch:
    """Return a batch whose flat lists of tags have these lengths."""
    batch, numbers = models.batch_of(len(lengths)), torch.tensor(lengths)
    batch["tags_values"] = torch.arange(int(numbers.sum())) % ids_below
    batch["tags_offsets"], batch["tags_lengths"] = numbers.cumsum(0) - numbers, numbers
    batch["tags_bounds"] = torch.cat([numbers.new_zeros(1), numbers.cumsum(0)])
    return batch


def _sums(its: Any, batch: Any, lengths: torch.Tensor | None = None) -> torch.Tensor:
    lengths = batch["tags_lengths"] if lengths is None else lengths
    offsets = lengths.cumsum(0) - lengths
    return nn.functional.embedding_bag(batch["tags_values"], its.table.weight, offsets, mode="sum")


def _not_of_seven(its: Any, batch: Any) -> torch.Tensor:
    return _sums(its, batch) * (batch["tags_lengths"] != 7).unsqueeze(-1)


def _not_ending_at_17(its: Any, batch: Any) -> torch.Tensor:
    return _sums(its, batch) * (batch["tags_lengths"].cumsum(0) != 17).unsqueeze(-1)


def _lengths_of_three_bits(its: Any, batch: Any) -> torch.Tensor:
    return _sums(its, batch, batch["tags_lengths"] & 7)


def _lengths_below_five(its: Any, batch: Any) -> torch.Tensor:
    return _sums(its, batch, batch["tags_lengths"] % 5)


def _lengths_looked_up(its: Any, batch: Any) -> torch.Tensor:
    return torch.cat([its.table(batch["tags_lengths"] % 5), _sums(its, batch)], dim=1)


def _lengths_beside(its: Any, batch: Any) -> torch.Tensor:
    return torch.cat([its.table(batch["tags_lengths"] & 7), _sums(its, batch)], dim=1)


class _WithLimit(nn.Embedding):
    """A table with a number beside it that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__(models.ROWS, models.DIM)
        self.limit = torch.tensor(7)


def _not_of_the_limit(its: Any, batch: Any) -> torch.Tensor:
    return _sums(its, batch) * (batch["tags_lengths"] != its.table.limit).unsqueeze(-1)


def _places_below_the_limit(its: Any, batch: Any) -> torch.Tensor:
    is_in = torch.arange(batch["clicks"].shape[1]) < its.table.limit
    return (its.table(batch["clicks"]) * is_in[None, :, None]).sum(1)


def _five_ids_apart(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["clicks"]).sum(1) * ((batch["clicks"] != 0).sum(1, keepdim=True) - 5 != 0)


def _apart_after_a_sum(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["user"]) * (batch["user"] + 3 != 15).unsqueeze(-1)


def _padding_after_a_remainder(its: Any, batch: Any) -> torch.Tensor:
    ids = batch["clicks"] % 1_000_003
    is_there = (ids != 5).unsqueeze(-1)
    return (its.table(ids % models.ROWS) * is_there).sum(1) / is_there.sum(1).clamp(min=1)


def _apart_by_two_ids(its: Any, batch: Any) -> torch.Tensor:
    rows, segment = its.table(batch["user"]), batch["label"].unsqueeze(-1)
    return torch.cat([rows * (batch["user"] + batch["label"] != 7700).unsqueeze(-1), segment], dim=1)


def _the_last_ten(its: Any, batch: Any) -> torch.Tensor:
    places, ends = torch.arange(10)[None], batch["tags_bounds"][1:, None]
    is_in = ends - places > batch["tags_bounds"][:-1, None]
    return (its.table(batch["tags_values"][torch.where(is_in, ends - places, 1) - 1]) * is_in.unsqueeze(-1)).sum(1)


def _the_first_ten(its: Any, batch: Any) -> torch.Tensor:
    places, starts = torch.arange(10)[None], batch["tags_bounds"][:-1, None]
    is_in = starts + places < batch["tags_bounds"][1:, None]
    return (its.table(batch["tags_values"][torch.where(is_in, starts + places, 0)]) * is_in.unsqueeze(-1)).sum(1)


NUMBERS_OF_OTHER_THINGS = {
    "a length apart": _not_of_seven,
    "an end apart": _not_ending_at_17,
    "bits of lengths": _lengths_of_three_bits,
    "remainders of lengths": _lengths_below_five,
    "remainders of lengths looked up": _lengths_looked_up,
    "bits of lengths looked up": _lengths_beside,
    "a length of the model": _not_of_the_limit,
    "a place of the model": _places_below_the_limit,
    "a count apart": _five_ids_apart,
    "an id after a sum": _apart_after_a_sum,
    "a padding id after a remainder": _padding_after_a_remainder,
    "two ids together": _apart_by_two_ids,
    "the last ten of a flat list": _the_last_ten,
    "the first ten of a flat list": _the_first_ten,
}


@pytest.mark.parametrize("name", NUMBERS_OF_OTHER_THINGS)
def test_a_number_that_meets_no_id_of_the_request_is_unknown(tmp_path: Path, name: str) -> None:
    """Lengths, offsets, counts, places and changed ids are no ids: what the code compares them with is not tried."""
    look, batch = NUMBERS_OF_OTHER_THINGS[name], with_lengths([2, 0, 3, 1, 4, 2])
    make = _WithLimit if "of the model" in name else lambda: nn.Embedding(models.ROWS, models.DIM)
    with torch.no_grad():
        width = models.Lookups(make(), look)(batch)["block"].shape[1]
    build = lambda: models.Model(models.Lookups(make(), look), width + 1)
    package, _ = run(tmp_path, build, [models.inputs_of(build(), batch)])
    assert "block" not in known_inputs(package)


def _mean_by_lengths(its: Any, batch: Any) -> torch.Tensor:
    return _sums(its, batch) / batch["tags_lengths"].clamp(min=1).unsqueeze(-1)


def _lengths_themselves(its: Any, batch: Any) -> torch.Tensor:
    return its.table(batch["tags_lengths"])


@pytest.mark.parametrize("look", [_mean_by_lengths, _lengths_themselves])
def test_lengths_that_divide_or_are_looked_up_as_they_are_are_stated(tmp_path: Path, look: Any) -> None:
    package, trained = run(tmp_path, one_table(look), [with_lengths([2, 0, 3, 1, 4, 2])])
    assert "block" in known_inputs(package)
    assert_same_inputs(package, trained, with_lengths([0, 9, 1, 29, 0, 7, 5]))


def _largest_with_zeros(its: Any, batch: Any) -> torch.Tensor:
    return (its.table(batch["clicks"]) * (batch["clicks"] != 0).unsqueeze(-1)).amax(1)


def test_a_maximum_in_which_padding_counts_as_zero_is_unknown(tmp_path: Path) -> None:
    """A small sample without padding does not tell it from a maximum of the ids that are no padding: many batches do."""
    batch = models.batch_of(2)
    batch["clicks"] = batch["clicks"] % 20 + 1
    package, _ = run(tmp_path, one_table(_largest_with_zeros), [batch])
    assert "block" not in known_inputs(package)


def test_a_bag_that_takes_the_maximum_of_padded_lists_is_stated(tmp_path: Path) -> None:
    """The made-up row of a padding id is not always a low one, which no maximum shows."""
    make = lambda: nn.EmbeddingBag(models.ROWS, models.DIM, mode="max", padding_idx=0)
    package, trained = run(tmp_path, one_table(lambda its, batch: its.table(batch["clicks"]), make))
    assert package.manifest.serving.features[0].padding_id == 0
    assert_same_inputs(package, trained, models.batch_of(40, seed=3))


def _masked_mean(its: Any, batch: Any) -> torch.Tensor:
    is_there = (batch["clicks"] != 0).unsqueeze(-1)
    return (its.table(batch["clicks"]) * is_there).sum(1) / is_there.sum(1).clamp(min=1)


@pytest.mark.parametrize(
    ("look", "shortest"),
    [
        (lambda its, batch: its.table(batch["clicks"]).mean(1), 1),
        (lambda its, batch: its.table(batch["clicks"]).amax(1), 1),
        (lambda its, batch: its.table(batch["clicks"]).sum(1), 0),
        (_masked_mean, 0),
    ],
    ids=["mean", "max", "sum", "masked mean"],
)
def test_padded_lists_without_columns_give_what_the_model_gives_or_are_refused(
    tmp_path: Path, look: Any, shortest: int
) -> None:
    package, trained = run(tmp_path, one_table(look))
    (feature,) = package.manifest.serving.features
    assert feature.shortest == shortest
    batch = models.batch_of(9)
    batch["clicks"] = batch["clicks"][:, :0]
    if shortest:
        with pytest.raises(UserError, match="'clicks' has 0 columns; the model has no value for fewer than 1"):
            dense_inputs(package, batch)
    else:
        assert_same_inputs(package, trained, batch)


def test_a_mean_over_a_fixed_number_of_columns_takes_no_fewer(tmp_path: Path) -> None:
    """The factors are floats, whose columns are fixed, so that no shorter list could be tried."""

    def look(its: Any, batch: Any) -> torch.Tensor:
        return (its.table(batch["clicks"]) * batch["factors"].unsqueeze(-1)).mean(1)

    batch = models.batch_of() | {"factors": torch.rand(6, 3)}
    package, trained = run(tmp_path, one_table(look), [batch])
    assert_same_inputs(package, trained, models.batch_of(9) | {"factors": torch.rand(9, 3)})
    shorter = {name: batch[name][:, :0] if name in ("clicks", "factors") else batch[name] for name in batch}
    with pytest.raises(UserError, match="has 0 columns"):
        dense_inputs(package, shorter)
